"""Causal language modelling with the loss on answers, for any Hugging Face model: the command line's default task.

The output layer is the widest layer of a language model. For SmolLM2-135M it takes a quarter of the forward pass, and at the quickstart's
lengths its output is by far the largest activation. Prompt positions have no loss, so logits are computed only where they predict an
answer token: a model whose forward takes a mask as ``logits_to_keep`` gets one; others compute all logits, and the rest is dropped.

In training, the logits of a frozen output layer never exist all at once (:mod:`lightning_lora.ops.cross_entropy`). They do if the output
layer trains, is adapted or split by tensor parallelism, or if the model changes its logits afterwards; the log then says why. The loss is
computed inside the layer's forward, the one place where FSDP2 has its weight.

The batch says where the answers are. To find that on a GPU, the process would wait in every step until the GPU has computed all before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from typing_extensions import override

from lightning_lora.layers.replaced_rows import Rows
from lightning_lora.ops.cross_entropy import (
    IGNORE,
    POSITIONS,
    SHARDED,
    WHOLE,
    answer_positions,
    bypassed,
    chunked_cross_entropy,
    unchunkable,
    wide,
)
from lightning_lora.tasks.base import HFTask, Perplexity
from lightning_lora.tasks.hf import generate_text
from lightning_lora.tasks.joining import join_batches, owned_means
from lightning_lora.tasks.packed_attention import packed_rows, use_attention
from lightning_lora.tasks.packing_check import MixesDocuments, packed_inputs, settle_attention
from lightning_lora.tasks.padding import ROWS, WORTH, end_to_end, is_compiled
from lightning_lora.trials.layout import Layout
from lightning_lora.utils.torch_private import compiled_call
from lightning_lora.utils.transformers_conventions import keeps_masked_logits, one_document_a_row


class CausalLMTask(HFTask):
    """A Hugging Face causal language model, trained to generate the answers.

    Log ``train_loss``, and for validation and test ``{val,test}_loss`` (mean over all answer tokens) and ``_perplexity``. For rows with
    choices, also log ``_accuracy``: how often greedy decoding limited to the choices gives the right one.

    Args:
        model: A hub id or a local folder.
        max_new_tokens: Longest answer in prediction, in tokens.
        attn_implementation: transformers' name of an attention: sdpa, eager, flex_attention, flash_attention_2, and so on. By default
            transformers chooses; for packed rows the fastest that keeps documents apart in this model is used.
        padding_free: Compute no padding: lay the rows of a batch end to end, where they do not see one another. "auto": on a CPU,
            uncompiled, where that was faster. A model that would mix the rows gets them padded then, and the log says why; for ``true`` it
            is refused.
        **shared: See `HFTask`.

    Examples:
        >>> task = CausalLMTask("models/llama", learning_rate=1e-3)
        >>> trainer = L.Trainer(max_epochs=1, callbacks=[LoRACallback(LoRAConfig(target_modules="all-linear"))])
        >>> trainer.fit(task, InstructionDataModule("rows/chat.jsonl", val=0.2))
        >>> sorted(trainer.callback_metrics)
        ['train_loss', 'val_accuracy', 'val_loss', 'val_perplexity']
    """

    auto_class = "AutoModelForCausalLM"
    data_class = "lightning_lora.data.InstructionDataModule"

    def __init__(
        self,
        model: str,
        max_new_tokens: PositiveInt = 32,
        attn_implementation: str | None = None,
        padding_free: bool | Literal["auto"] = "auto",
        **shared: Any,
    ) -> None:
        super().__init__(model, **shared)
        self.load()
        # Read here, while type(self.model) is still the class in the modeling file: wrappers such as FSDP2 change it.
        self.keeps_logits = keeps_masked_logits(self.model)
        self._needs_logits: str | None = None  # why the loss cannot be computed in chunks, once that is known
        self._told = False
        self._apart = False  # the model was seen to keep the documents of a row apart
        self._unpads: bool | None = None  # whether batches are laid end to end; known with the first one
        if attn_implementation is not None:
            use_attention(self.model, attn_implementation)

    @override
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits at the N positions that predict an answer token (N, V), and those tokens (N,), row by row."""
        before, positions = self._places(batch)
        if not self.keeps_logits:
            return _rows(self._outputs(batch), before), _rows(batch["labels"], positions)
        answers = batch["labels"][:, 1:] != IGNORE  # (B, T - 1); position t predicts token t + 1
        logits = self._outputs(batch, len(positions), keep=F.pad(answers, (0, 1), value=False))
        return logits, _rows(batch["labels"], positions)

    def _places(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return where the N answer tokens are predicted in what the model computes, and where they stand in the batch.

        Both are flat positions (N,).
        """
        positions, rows = positions_of(batch), self._end_to_end(batch)
        before = positions - 1
        return before if rows is None else torch.searchsorted(rows["index"], before), positions

    def _end_to_end(self, batch: dict[str, Any]) -> dict[str, Any] | None:
        """Return how the batch's rows are laid end to end, None if they are not."""
        return batch.get(ROWS) if self._apart else None

    def _outputs(self, batch: dict[str, Any], predicted: int | None = None, keep: Tensor | None = None) -> Tensor:
        """Return the model's logits.

        Args:
            batch: A batch.
            predicted: How many positions the output layer computes, for the count of FLOPs; by default all.
            keep: A mask (B, T) of the positions whose logits the model is to return; by default all.
        """
        ids, rows = batch["input_ids"], self._end_to_end(batch)
        if rows is not None:
            ids, keep = (values if values is None else values.flatten()[rows["index"]][None] for values in (ids, keep))
        head, tokens = self.model.get_output_embeddings(), ids.numel()
        self.count_flops((part, predicted if part is head and predicted is not None else tokens) for part in self.model.children())
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False} | ({} if keep is None else {"logits_to_keep": keep})
        if rows is None and "position_ids" not in batch:
            if not batch.get(WHOLE):
                return self.model(**inputs, attention_mask=batch["attention_mask"]).logits
            with one_document_a_row():
                return self.model(**inputs).logits
        with packed_rows():
            return self.model(**inputs, **packed_inputs(self.model, batch if rows is None else rows)).logits

    # Rows that do not see one another.

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._unpads = None

    def note_padding(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Note in a padded batch where its tokens stand. Data modules call it while the batch is on the CPU."""
        setting = self.hparams["padding_free"]
        if self._unpads is None:
            fits = self.device.type == "cpu" and not is_compiled(self)  # it was not timed on a GPU
            self._unpads = setting is True or (setting == "auto" and fits)
        padded = {"attention_mask", "labels"} <= batch.keys()
        rows = end_to_end(batch["attention_mask"], WORTH * (setting == "auto")) if self._unpads and padded else None
        return batch if rows is None else {**batch, ROWS: rows}

    def settle(self, batch: dict[str, Any]) -> None:
        """Before the first batch: see whether the model keeps the documents of a row apart, and choose its attention.

        Raises:
            ValueError: It does not, and ``data.packing`` or ``padding_free`` asks for it.
        """
        packed = "position_ids" in batch
        if self._apart or not (packed or self._unpads):
            return
        ids, fixed = batch["input_ids"], self.hparams["attn_implementation"] is not None
        length, longest = (ids.shape[1], batch["max_length_q"]) if packed else (ids.numel(), ids.shape[1])
        asked = packed or self.hparams["padding_free"] is True
        try:
            said = settle_attention(self.model, length, longest, ids.device, fixed=fixed, masks=asked)
            self._apart = True
        except MixesDocuments as error:
            if asked:
                raise
            self._unpads, said = False, f"Batches keep their padding: {error.reason}."
        rank_zero_info(said)

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.settle(batch)
        loss = self.training_loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of a batch. Trials side by side replace it on the instance (`lightning_lora.trials`)."""
        return self.answer_loss(batch)

    def join(self, batches: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], Layout, Tensor]:
        """Return a joint batch; see `join_batches`."""
        kept = [{key: value for key, value in batch.items() if key != ROWS or self._apart} for batch in batches]
        return join_batches(kept)

    def losses_by_owner(self, batch: dict[str, Any], owner: Tensor, trials: int) -> Tensor:
        """Return the mean loss of each trial (trials,), given the trial of each row of a joint batch (B,)."""
        positions = positions_of(batch)
        of_answers = owner[positions // batch["labels"].shape[1]]
        losses = self.answer_loss(batch, reduction="none")
        return owned_means(losses, of_answers, torch.ones_like(of_answers), trials)

    def answer_loss(self, batch: dict[str, Tensor], reduction: Literal["mean", "none"] = "mean") -> Tensor:
        """Return the loss over the N answer tokens: the mean, or each token's (N,), row by row."""
        head = self.model.get_output_embeddings()
        reason = self._needs_logits or unchunkable(head)
        if reason is None:
            before, positions = self._places(batch)
            answers = _rows(batch["labels"], positions)
            compiled = answers.is_cuda and any(compiled_call(module) is not None for module in self.model.modules())

            def losses(hidden: Tensor) -> Tensor:
                own, hidden = head.rows_now if isinstance(head, Rows) else None, _rows(hidden, before)
                return chunked_cross_entropy(hidden, head.weight, answers, head.bias, compiled=compiled, reduction=reduction, replaced=own)

            with bypassed(head, self.model, losses) as found:
                hidden = self._outputs(batch, len(positions))
            if len(found) == 1 and hidden is found[0][0]:
                return found[0][1]
            reason = self._needs_logits = f"{type(self.model).__name__} does something to its logits" if found else SHARDED
        if not self._told:
            self._told = True
            rank_zero_info(f"The loss takes all logits at once: {reason}.")
        logits, answers = self(batch)
        return F.cross_entropy(wide(logits), answers, reduction=reduction)

    @override
    def make_metrics(self) -> dict[str, Metric]:
        return {"loss": MeanMetric(), "perplexity": Perplexity(), "accuracy": MeanMetric()}

    @override
    def evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        self.settle(batch)
        logits, answers = self(batch)
        logits, rows = wide(logits), len(batch["labels"])
        losses = F.cross_entropy(logits, answers, reduction="none")
        self.measure(stage, "loss", losses, rows=rows)
        self.measure(stage, "perplexity", losses, rows=rows)
        if "rivals" in batch:
            self.measure(stage, "accuracy", chosen_right(logits, answers, batch["rivals"]).float(), rows=rows)

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, str]]:
        """Return the prompts and the model's greedy answers."""
        texts = generate_text(self.model, self.tokenizer, batch["input_ids"], batch["attention_mask"], self.hparams["max_new_tokens"])
        return [{"prompt": prompt, "response": text} for prompt, text in zip(batch["prompts"], texts, strict=True)]


def positions_of(batch: dict[str, Any]) -> Tensor:
    """Return where the labels (B, T) have a loss: positions in the flattened batch (N,)."""
    return batch[POSITIONS] if POSITIONS in batch else answer_positions(batch["labels"])


def _rows(values: Tensor, positions: Tensor) -> Tensor:
    """Return the rows (N, ...) of values (B, T, ...) at flat positions. A mask would make the process wait for its count."""
    return values.flatten(0, 1).index_select(0, positions)


def chosen_right(logits: Tensor, answers: Tensor, rivals: Tensor) -> Tensor:
    """Tell which rows with choices are answered right: the answer's token beats every rival's at the first token that differs.

    Args:
        logits: (N, V), at the positions that predict the batch's answer tokens.
        answers: (N,), those tokens.
        rivals: (M, 3), see `lightning_lora.data.batching.collate_answers`.

    Returns:
        One bool per row that has rivals, in row order.
    """
    row, position, token = rivals.unbind(1)
    lost = logits[position, token] >= logits[position, answers[position]]
    rows, row = row.unique(return_inverse=True)
    return torch.zeros_like(rows).index_add(0, row, lost.long()) == 0
