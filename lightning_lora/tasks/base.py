"""What all tasks share: a Hugging Face model, its optimizer and schedule, metrics per stage, the FLOPs of a batch.

A task is a subclass in a file of its own. It names its class of model, defines a training loss, what it measures, and what it predicts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, cast

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, Metric
from typing_extensions import override

from lightning_lora.optim import GaLoreConfig, galore_optimizer, galore_param_groups
from lightning_lora.optim.advice import HALF
from lightning_lora.strategies.lightning_private import has_trainer
from lightning_lora.strategies.namespaces import twins
from lightning_lora.tasks.flops import FlopsPerPosition
from lightning_lora.tasks.hf import DType, check_writes, enable_checkpointing, load_empty, load_model, load_tokenizer
from lightning_lora.tasks.rates import learning_rate_of

STAGES = ("val", "test")
CHAT_TEMPLATE, TASK = "chat_template", "task"  # keys in a checkpoint
SHOWN = ("loss", "accuracy")  # in the progress bar


class Perplexity(MeanMetric):
    """The exponential of a mean loss over tokens."""

    @override
    def compute(self) -> Tensor:
        return super().compute().exp()


def rows_of(batch: dict[str, Any]) -> int:
    """Return the rows of a batch of any task: the ``batch_size_fn`` of Lightning's ``ThroughputMonitor``, which YAML names by its path.

    Examples:
        >>> from lightning.pytorch.callbacks import ThroughputMonitor
        >>> monitor = ThroughputMonitor(batch_size_fn=rows_of)
        >>> rows_of({"input_ids": torch.zeros(4, 16, dtype=torch.long)})
        4
    """
    return len(batch["labels"] if "labels" in batch else next(iter(batch.values())))


class HFTask(LightningModule, ABC):
    """A Hugging Face model with an optimizer, a schedule and metrics.

    Args:
        model: A hub id or a local folder.
        gguf_file: A GGUF file in it, dequantized when loaded (needs the extra ``gguf``).
        dtype: The weights' dtype; "auto" keeps the checkpoint's own.
        learning_rate: AdamW's learning rate after the warm-up. "auto": from the method, its scaling and the model's width
            (`lightning_lora.optim.advice`); the log has the reason.
        weight_decay: AdamW's weight decay.
        warmup: Fraction of the steps over which the learning rate rises.
        schedule: How the learning rate falls to zero after the warm-up, or "constant".
        gradient_checkpointing: Recompute activations in the backward pass: about a third more time for far less memory.
        galore: Full-parameter training with GaLore instead of AdamW (needs the extra ``galore``, and no LoRA).
        on_meta: Build the model on the meta device, without its weights: for models larger than a GPU, or than host memory once per
            process. Give their folder as ``LoRACallback(weights=...)`` too, with ``strategy="lora_fsdp2"``.

    Attributes:
        auto_class: The class of transformers that picks the model's own.
        data_class: The data module that the command line takes by default, as an import path.
        rate_share: The advised learning rate of its loss over that of cross entropy, and why.
        metrics: ``{val,test}_{name}`` → metric, logged under that name.
    """

    auto_class: ClassVar[str]
    data_class: ClassVar[str]
    rate_share: ClassVar[tuple[float, str]] = (1.0, "")

    def __init__(
        self,
        model: str,
        gguf_file: str | None = None,
        dtype: DType = "auto",
        learning_rate: PositiveFloat | Literal["auto"] = 1e-3,
        weight_decay: NonNegativeFloat = 0.0,
        warmup: ClosedUnitInterval = 0.05,
        schedule: Literal["constant", "linear", "cosine"] = "cosine",
        gradient_checkpointing: bool = False,
        galore: GaLoreConfig | None = None,
        on_meta: bool = False,
    ) -> None:
        super().__init__()
        self.galore = galore
        self.save_hyperparameters(ignore="galore")  # a checkpoint may hold plain types only
        self.model: Any = None
        self.metrics = nn.ModuleDict()
        self._flops = 0.0
        self._per_position: FlopsPerPosition | None = None
        self.load_preprocessor()

    def load_preprocessor(self) -> None:
        """Load what turns data into the model's input: the tokenizer."""
        self.tokenizer = load_tokenizer(self.hparams["model"], self.hparams["gguf_file"])

    def load(self, **config: Any) -> None:
        """Load the model, in training mode, and make the metrics. ``config`` has fields of the model's configuration."""
        loading = load_empty if self.hparams["on_meta"] else load_model
        self.model = loading(self.auto_class, self.hparams["model"], self.hparams["gguf_file"], self.hparams["dtype"], **config)
        check_writes(self.auto_class, self.hparams["model"], self.model.config)
        # from_pretrained returns a model in evaluation mode, Lightning keeps that, and gradient checkpointing needs training mode.
        self.model.train()
        if self.hparams["gradient_checkpointing"]:
            enable_checkpointing(self.model)
        self.metrics = nn.ModuleDict({f"{stage}_{name}": metric for stage in STAGES for name, metric in self.make_metrics().items()})

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HFTask:
        """Convert the module, but leave fp32 buffers in fp32 that no checkpoint has.

        Rotary frequencies are such buffers. ``precision="bf16-true"`` would round them, and with them every position; from_pretrained
        in bfloat16 leaves them as they are.
        """
        modules = list(self.modules())
        kept = {id(b): b for m in modules for name in m._non_persistent_buffers_set if (b := m._buffers[name]) is not None}

        def converted(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            halved = id(tensor) in kept and new.dtype in HALF and tensor.dtype not in HALF
            return tensor.to(new.device) if halved else new

        return super()._apply(converted, recurse)

    @override
    def cpu(self) -> HFTask:
        """Move to the CPU, but stay on the meta device: at the end of a run that failed there, torch's error would hide the reason."""
        return self if any(p.is_meta for p in self.parameters()) else super().cpu()

    @abstractmethod
    def make_metrics(self) -> dict[str, Metric]:
        """Return new metrics of one stage by name."""

    @abstractmethod
    def evaluate(self, batch: dict[str, Any], stage: str) -> None:
        """Update the stage's metrics with a batch."""

    def measure(self, stage: str, name: str, *values: Any, rows: int) -> None:
        """Update a metric and log it."""
        metric = cast(Metric, self.metrics[f"{stage}_{name}"])
        metric.update(*values)
        self.log(f"{stage}_{name}", metric, prog_bar=name in SHOWN, batch_size=rows)

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    @override
    def on_validation_epoch_start(self) -> None:
        self._restart()

    @override
    def on_test_epoch_start(self) -> None:
        self._restart()

    def _restart(self) -> None:
        # trainer.validate leaves inference tensors in the metrics, which the validation within a later fit must not update.
        for metric in self.metrics.values():
            cast(Metric, metric).reset()

    # FLOPs, for ThroughputMonitor.

    @override
    def setup(self, stage: str) -> None:
        # Here LoRA is applied, and nothing is sharded yet.
        self._per_position = FlopsPerPosition(self.model)

    @property
    def flops_per_batch(self) -> float:
        """FLOPs of this process's last batch, as :mod:`lightning_lora.tasks.flops` counts them. ``ThroughputMonitor`` reads it."""
        return self._flops

    def count_flops(self, parts: Iterable[tuple[nn.Module, int]]) -> None:
        """Add a forward pass to the batch's FLOPs, and its backward pass if gradients are on.

        Args:
            parts: Parts of the model, and how many positions (tokens of all rows) each computes. They do not overlap.
        """
        if self._per_position is not None:  # None outside a Trainer
            self._flops += self._per_position.total(parts, training=torch.is_grad_enabled())

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._flops = 0.0

    @override
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._flops = 0.0

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    # Checkpoints and the optimizer.

    def described(self) -> dict[str, Any]:
        """Return what one has to know to use the trained model elsewhere, as plain types: the model's class, and what a subclass adds."""
        return {"auto_class": self.auto_class}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the task is, and the tokenizer's chat template, which may be the data module's. Commands that load it ask with both."""
        checkpoint[TASK] = self.described()
        template = getattr(getattr(self, "tokenizer", None), "chat_template", None)
        if template:
            checkpoint[CHAT_TEMPLATE] = template

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Log which settings of a resumed optimizer are the checkpoint's."""
        theirs, fits = checkpoint.get("hyper_parameters", {}), has_trainer(self) and self.trainer.state.fn == TrainerFn.FITTING
        for name in ("learning_rate", "weight_decay"):
            mine = self.hparams[name]
            if fits and theirs.get(name, mine) != mine:
                rank_zero_info(f"{name}={mine} has no effect: the optimizer goes on with {theirs[name]}, from the checkpoint.")

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        rates = {"lr": learning_rate_of(self), "weight_decay": self.hparams["weight_decay"]}
        optimizer: Optimizer
        if self.galore is None:
            trained = [p for p in self.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, **rates, fused=self._fuses(trained) or None)
        else:
            optimizer = galore_optimizer(galore_param_groups(self, **rates, config=self.galore))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _fuses(self, trained: list[nn.Parameter]) -> bool:
        """Return whether the optimizer steps in one kernel. Lightning refuses to clip gradients for such an optimizer under AMP."""
        clips = isinstance(self.trainer.precision_plugin, twins(MixedPrecision)) and self.trainer.gradient_clip_val
        return not clips and all(p.is_cuda for p in trained)

    def _schedule(self) -> Callable[[int], float]:
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
