"""Sequence to sequence: translation, summaries, and other texts written from texts, with models that have an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.functional.text.rouge import rouge_score
from torchmetrics.text import SacreBLEUScore
from typing_extensions import override

from lightning_lora.ops.cross_entropy import IGNORE, wide
from lightning_lora.tasks.base import HFTask, Perplexity
from lightning_lora.tasks.hf import is_sharded_model

ROUGES = ("rouge1", "rouge2", "rougeL")  # F-measures without stemming; rougeLsum would download data


class Seq2SeqTask(HFTask):
    """A Hugging Face model with encoder and decoder, trained to write a text from another.

    Log ``train_loss``, and for validation and test ``{val,test}_loss`` (mean over all tokens of the target) and ``_perplexity``. With
    ``predict_with_generate`` also ``_bleu`` (sacreBLEU), ``_rouge1``, ``_rouge2`` and ``_rougeL`` (F-measures) of the texts that the model
    writes. Prediction gives the source and what the model writes.

    Args:
        model: A hub id or a local folder.
        predict_with_generate: In validation and test, write texts and compare them with the targets. It takes most of that time.
        max_new_tokens: Longest text that the model writes, in tokens.
        num_beams: Beams of the search; 1 is greedy.
        **shared: See `HFTask`.

    Attributes:
        source_prefix: Text before every source; the data module sets it. It is saved with the adapter.

    Examples:
        >>> task = Seq2SeqTask("models/t5", learning_rate=1e-3, max_new_tokens=4)
        >>> trainer = L.Trainer(max_epochs=1, callbacks=[LoRACallback(LoRAConfig(target_modules="all-linear"))])
        >>> trainer.fit(task, Seq2SeqDataModule("rows/texts.jsonl"))
        >>> rows = trainer.predict(task, Seq2SeqDataModule(predict="rows/texts.jsonl"))[0]
        >>> sorted(rows[0])
        ['source', 'text']
    """

    auto_class = "AutoModelForSeq2SeqLM"
    data_class = "lightning_lora.data.Seq2SeqDataModule"

    def __init__(
        self, model: str, predict_with_generate: bool = True, max_new_tokens: PositiveInt = 64, num_beams: PositiveInt = 1, **shared: Any
    ) -> None:
        super().__init__(model, **shared)
        self.source_prefix = ""
        self.load()

    @override
    def described(self) -> dict[str, Any]:
        return super().described() | {"source_prefix": self.source_prefix}

    @override
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits at the N positions that predict a token of the target (N, V), and those tokens (N,)."""
        self.count_flops(self._parts(batch))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        logits, counts = self.model(**inputs, use_cache=False).logits, batch["labels"] != IGNORE
        return wide(logits[counts]), batch["labels"][counts]

    def _parts(self, batch: dict[str, Tensor]) -> Iterator[tuple[nn.Module, int]]:
        """Yield the encoder, which computes the source, and all else, which computes the target.

        The decoder's products with the encoder's output are counted at the target's length.
        """
        encoder = self.model.get_encoder()
        yield encoder, batch["input_ids"].numel()
        parts = [self.model]
        for part in parts:  # the loop appends to it
            around = encoder in part.modules()
            parts += [child for child in part.children() if around and child is not encoder]
            if not around:
                yield part, batch["labels"].numel()

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(*self(batch))
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    @override
    def make_metrics(self) -> dict[str, Metric]:
        written = {"bleu": SacreBLEUScore(), **{kind: MeanMetric() for kind in ROUGES}} if self.hparams["predict_with_generate"] else {}
        return {"loss": MeanMetric(), "perplexity": Perplexity(), **written}

    @override
    def evaluate(self, batch: dict[str, Any], stage: str) -> None:
        logits, targets = self(batch)
        losses, rows = F.cross_entropy(logits, targets, reduction="none"), len(batch["labels"])
        for name in ("loss", "perplexity"):
            self.measure(stage, name, losses, rows=rows)
        if self.hparams["predict_with_generate"]:
            texts = self._write(batch)
            self.measure(stage, "bleu", texts, [[target] for target in batch["targets"]], rows=rows)
            scores = rouge_score(texts, batch["targets"], rouge_keys=ROUGES)
            for kind in ROUGES:  # ROUGEScore gathers row by row, and waits for ever if another process has fewer
                self.measure(stage, kind, scores[f"{kind}_fmeasure"], rows, rows=rows)

    def _write(self, batch: dict[str, Any]) -> list[str]:
        options = {"max_new_tokens": self.hparams["max_new_tokens"], "num_beams": self.hparams["num_beams"], "do_sample": False}
        options["synced_gpus"] = is_sharded_model(self.model)
        output = self.model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)
        return self.tokenizer.batch_decode(output, skip_special_tokens=True)

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, str]]:
        """Return each source with the text that the model writes."""
        return [{"source": source, "text": text} for source, text in zip(batch["sources"], self._write(batch), strict=True)]
