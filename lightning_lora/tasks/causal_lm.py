"""Causal language modelling with the loss on answers, for any Hugging Face model: the command line's default task.

The output layer is the widest layer of a language model. For SmolLM2-135M it takes a quarter of the forward pass, and at the quickstart's
lengths its output is by far the largest activation. Prompt positions have no loss, so logits are computed only where they predict an
answer token: a model whose forward takes a mask as ``logits_to_keep`` gets one; others compute all logits, and the rest is dropped.

In training, the logits of a frozen output layer never exist all at once (:mod:`lightning_lora.ops.cross_entropy`). They do if the output
layer trains, is adapted or sharded, or if the model changes its logits afterwards; the log then says why.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_lora.ops.cross_entropy import IGNORE, bypassed, chunked_cross_entropy, unchunkable
from lightning_lora.optim import GaLoreConfig, galore_optimizer, galore_param_groups
from lightning_lora.tasks.hf import DType, enable_checkpointing, generate_text, load_causal_lm
from lightning_lora.tasks.packed_attention import packed_rows, use_attention
from lightning_lora.tasks.packing_check import packed_inputs, settle_attention
from lightning_lora.utils.torch_private import compiled_call
from lightning_lora.utils.transformers_conventions import keeps_masked_logits


class CausalLMTask(LightningModule):
    """A Hugging Face causal language model, trained to generate the answers.

    Log ``train_loss``, and for validation and test ``{val,test}_loss`` (mean over all answer tokens) and ``_perplexity``. For rows with
    choices, also log ``_accuracy``: how often greedy decoding limited to the choices gives the right one.

    Args:
        model: A hub id or a local folder.
        gguf_file: A GGUF file in it, dequantized when loaded (needs the extra ``gguf``).
        dtype: The weights' dtype; "auto" keeps the checkpoint's own.
        learning_rate: AdamW's learning rate after the warm-up.
        weight_decay: AdamW's weight decay.
        warmup: Fraction of the steps over which the learning rate rises.
        schedule: How the learning rate falls to zero after the warm-up, or "constant".
        gradient_checkpointing: Recompute activations in the backward pass: about a third more time for far less memory.
        max_new_tokens: Longest answer in prediction, in tokens.
        attn_implementation: transformers' name of an attention: sdpa, eager, flex_attention, flash_attention_2, and so on. By default
            transformers chooses; for packed rows the fastest that keeps documents apart in this model is used.
        galore: Full-parameter training with GaLore instead of AdamW (needs the extra ``galore``, and no LoRA).
    """

    def __init__(
        self,
        model: str,
        gguf_file: str | None = None,
        dtype: DType = "auto",
        learning_rate: PositiveFloat = 1e-3,
        weight_decay: NonNegativeFloat = 0.0,
        warmup: ClosedUnitInterval = 0.05,
        schedule: Literal["constant", "linear", "cosine"] = "cosine",
        gradient_checkpointing: bool = False,
        max_new_tokens: PositiveInt = 32,
        attn_implementation: str | None = None,
        galore: GaLoreConfig | None = None,
    ) -> None:
        super().__init__()
        self.galore = galore
        self.save_hyperparameters(ignore="galore")  # a checkpoint may hold plain types only
        self.model, self.tokenizer = load_causal_lm(model, gguf_file, dtype)
        # Read here, while type(self.model) is still the class in the modeling file: wrappers such as FSDP2 change it.
        self.keeps_logits = keeps_masked_logits(self.model)
        self._needs_logits: str | None = None  # why the loss cannot be computed in chunks, once that is known
        self._told = False
        self._packs = False  # the model was seen to keep the documents of packed rows apart
        if attn_implementation is not None:
            use_attention(self.model, attn_implementation)
        # from_pretrained returns a model in evaluation mode, Lightning keeps that, and gradient checkpointing needs training mode.
        self.model.train()
        if gradient_checkpointing:
            enable_checkpointing(self.model)
        self.means = nn.ModuleDict({f"{stage}_{name}": MeanMetric() for stage in ("val", "test") for name in ("loss", "accuracy")})

    @override
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits at the N positions that predict an answer token (N, V), and those tokens (N,), row by row."""
        logits, predicts, answers = self._outputs(batch)
        return logits if self.keeps_logits else logits[predicts], answers

    def _outputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the model's logits, a mask of the positions that predict an answer token (B, T), and those tokens (N,)."""
        labels = batch["labels"][:, 1:]  # position t predicts token t + 1
        answers = labels != IGNORE  # (B, T - 1)
        predicts = F.pad(answers, (0, 1), value=False)  # (B, T)
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
        if self.keeps_logits:
            inputs["logits_to_keep"] = predicts
        if "position_ids" not in batch:
            return self.model(**inputs, attention_mask=batch["attention_mask"]).logits, predicts, labels[answers]
        with packed_rows():
            return self.model(**inputs, **packed_inputs(self.model, batch)).logits, predicts, labels[answers]

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if "position_ids" in batch and not self._packs:
            tokens, fixed = batch["input_ids"], self.hparams["attn_implementation"] is not None
            rank_zero_info(settle_attention(self.model, tokens.shape[1], batch["max_length_q"], tokens.device, fixed=fixed))
            self._packs = True
        loss = self._chunked_loss(batch)
        if loss is None:
            logits, answers = self(batch)
            loss = F.cross_entropy(logits.float(), answers)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def _chunked_loss(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Return the loss, computed without all logits at once; None if this model needs them."""
        head = self.model.get_output_embeddings()
        reason = self._needs_logits or unchunkable(head)
        if reason is None:
            with bypassed(head) as inputs:
                hidden, predicts, answers = self._outputs(batch)
            if len(inputs) == 1 and hidden is inputs[0]:
                hidden = hidden if self.keeps_logits else hidden[predicts]
                compiled = hidden.is_cuda and any(compiled_call(module) is not None for module in self.model.modules())
                return chunked_cross_entropy(hidden, head.weight, answers, head.bias, compiled=compiled)
            reason = self._needs_logits = f"{type(self.model).__name__} does something to its logits"
        if not self._told:
            self._told = True
            rank_zero_info(f"The loss takes all logits at once: {reason}.")
        return None

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        logits, answers = self(batch)
        logits = logits.float()
        rows = len(batch["labels"])
        values = {"loss": F.cross_entropy(logits, answers, reduction="none")}
        if "rivals" in batch:
            values["accuracy"] = chosen_right(logits, answers, batch["rivals"]).float()
        for name, value in values.items():
            mean = self._mean(stage, name)
            mean.update(value)
            self.log(f"{stage}_{name}", mean, prog_bar=True, batch_size=rows)

    def _mean(self, stage: str, name: str) -> MeanMetric:
        return cast(MeanMetric, self.means[f"{stage}_{name}"])

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    @override
    def on_validation_epoch_start(self) -> None:
        self._restart()

    @override
    def on_test_epoch_start(self) -> None:
        self._restart()

    def _restart(self) -> None:
        # trainer.validate leaves inference tensors in the metrics, which the validation within a later fit must not update.
        for mean in self.means.values():
            cast(MeanMetric, mean).reset()

    @override
    def on_validation_epoch_end(self) -> None:
        self.log("val_perplexity", self._mean("val", "loss").compute().exp())

    @override
    def on_test_epoch_end(self) -> None:
        self.log("test_perplexity", self._mean("test", "loss").compute().exp())

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, str]]:
        """Return the prompts and the model's greedy answers."""
        texts = generate_text(self.model, self.tokenizer, batch["input_ids"], batch["attention_mask"], self.hparams["max_new_tokens"])
        return [{"prompt": prompt, "response": text} for prompt, text in zip(batch["prompts"], texts, strict=True)]

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Log which settings of a resumed optimizer are the checkpoint's."""
        theirs, fits = checkpoint.get("hyper_parameters", {}), self.trainer.state.fn == TrainerFn.FITTING
        for name in ("learning_rate", "weight_decay"):
            mine = self.hparams[name]
            if fits and theirs.get(name, mine) != mine:
                rank_zero_info(f"{name}={mine} has no effect: the optimizer goes on with {theirs[name]}, from the checkpoint.")

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        rates = {"lr": self.hparams["learning_rate"], "weight_decay": self.hparams["weight_decay"]}
        optimizer: Optimizer
        if self.galore is None:
            optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], **rates)
        else:
            optimizer = galore_optimizer(galore_param_groups(self, **rates, config=self.galore))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _schedule(self) -> Any:
        """Return the learning rate's factor as a function of the optimizer step."""
        shape, total = self.hparams["schedule"], self.trainer.estimated_stepping_batches
        if math.isinf(total) and (shape != "constant" or self.hparams["warmup"]):
            raise ValueError(
                f"schedule={shape!r} with warmup={self.hparams['warmup']} must know where training ends; set trainer.max_epochs or "
                "trainer.max_steps, or schedule: constant with warmup: 0"
            )
        warm = 0 if math.isinf(total) else round(self.hparams["warmup"] * total)

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / (warm + 1)  # not zero at the first step
            done = min(1.0, (step - warm) / max(1, total - warm))
            return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[shape]

        return factor


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
