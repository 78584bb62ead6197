"""What tasks with labels share: the labels' names, a head of their size, cross entropy, accuracy and F1.

The names are in the model's own configuration (``id2label``), so they are in every checkpoint of the task and in every exported model. A
model whose checkpoint has no head for the task is loaded once its labels are known. Its head is new, trains in full, and is saved with
the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from typing_extensions import override

from lightning_lora.ops.cross_entropy import IGNORE, wide
from lightning_lora.tasks.base import HFTask
from lightning_lora.tasks.hf import load_config
from lightning_lora.tasks.joining import join_batches, owned_means
from lightning_lora.utils.messages import listed
from lightning_lora.utils.transformers_conventions import is_loaded


class LabelTask(HFTask):
    """A Hugging Face model that gives one of several labels, trained with cross entropy.

    Log ``train_loss``, and for validation and test ``{val,test}_loss``, ``_accuracy`` and ``_f1`` (the mean over the labels, "macro").

    Args:
        model: A hub id or a local folder.
        labels: The labels' names, in the order of the head's outputs. By default the data module gives those of its training rows, or
            the model has them.
        **shared: See `HFTask`.
    """

    inputs: tuple[str, ...]  # what of a batch the model's forward takes

    def __init__(self, model: str, labels: Sequence[str | int] | None = None, **shared: Any) -> None:
        super().__init__(model, **shared)
        self._own = [] if labels is not None else self._own_labels()  # labels that others may replace
        if labels is not None:
            self.set_labels(labels)
        elif self._own:
            self._load(self._own)

    @property
    def labels(self) -> list[str]:
        """The labels' names; empty as long as they are not known."""
        return [] if self.model is None else [str(self.model.config.id2label[i]) for i in range(self.model.config.num_labels)]

    @property
    def labels_given(self) -> bool:
        """Whether its labels are fixed. Those of a model's own head are replaced by others."""
        return self.model is not None and not self._own

    def set_labels(self, labels: Sequence[str | int]) -> None:
        """Give the model a head for these labels. If it knows them all, its head stays as it is.

        Raises:
            ValueError: There are fewer than two labels, two are equal, or the task was given others before.
        """
        names, known = [str(label) for label in labels], self.labels
        if not set(names) <= set(known):
            if len(names) < 2 or len(set(names)) < len(names):
                raise ValueError(f"labels={listed(names)}: there must be at least two, all different")
            if known and known != self._own:
                new = sorted(set(names) - set(known))
                raise ValueError(f"{new[0]!r} is none of the task's labels {listed(known)}; correct the rows, or set model.labels")
            if known:
                rank_zero_info(f"The labels of the model's own head, {listed(known)}, are replaced by {listed(names)}.")
            self._load(names)
        self._own = []

    def _own_labels(self) -> list[str]:
        """Return the labels of the checkpoint's own head for this task; empty if it has none, or none with names."""
        config = load_config(self.hparams["model"], self.hparams["gguf_file"])
        suffix = self.auto_class.removeprefix("AutoModel")
        names = [str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items())]
        heads = any(str(name).endswith(suffix) for name in getattr(config, "architectures", None) or ())
        return names if heads and not all(name.startswith("LABEL_") for name in names) else []

    def _load(self, names: list[str]) -> None:
        self.hparams["labels"] = names
        self.load(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}, num_labels=len(names))
        fresh = [name for name, parameter in self.model.named_parameters() if not is_loaded(parameter)]
        if fresh and not self.hparams["on_meta"]:
            rank_zero_info(f"Not in {self.hparams['model']}, so new: {listed(fresh)}.")
        text, tokenizer = self.model.config.get_text_config(), getattr(self, "tokenizer", None)
        if tokenizer is not None and text.pad_token_id is None:  # by which a decoder finds where a row of a batch ends
            text.pad_token_id = tokenizer.pad_token_id

    @override
    def described(self) -> dict[str, Any]:
        return super().described() | {"labels": self.labels}

    @override
    def setup(self, stage: str) -> None:
        if self.model is None:
            raise ValueError(f"the labels are not known: give {type(self).__name__} labels=[...], or {self.data_class.rpartition('.')[2]}")
        super().setup(stage)

    @override
    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return the logits: (B, C), or (B, T, C) where every token has a label."""
        self.count_flops(self.parts(batch))
        return self.model(**{name: batch[name] for name in self.inputs if name in batch}).logits

    def parts(self, batch: dict[str, Any]) -> Sequence[tuple[nn.Module, int]]:
        """Return parts of the model and how many positions each computes; see `HFTask.count_flops`."""
        return [(self.model, batch["input_ids"].numel())]

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.training_loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of a batch. Trials side by side replace it on the instance (`lightning_lora.trials`)."""
        return F.cross_entropy(wide(self(batch)).flatten(0, -2), batch["labels"].flatten(), ignore_index=IGNORE)

    def losses_by_owner(self, batch: dict[str, Any], owner: Tensor, trials: int) -> Tensor:
        """Return the mean loss of each trial (trials,), given the trial of each row of a joint batch (B,)."""
        logits, labels = wide(self(batch)), batch["labels"]
        owners = owner.view(-1, *[1] * (labels.ndim - 1)).expand_as(labels).flatten()
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none")
        return owned_means(losses, owners, labels.flatten() != IGNORE, trials)

    join = staticmethod(join_batches)

    @override
    def make_metrics(self) -> dict[str, Metric]:
        size = len(self.labels)
        f1 = MulticlassF1Score(size, average="macro")
        return {"loss": MeanMetric(), "accuracy": MulticlassAccuracy(size, average="micro"), "f1": f1}

    @override
    def evaluate(self, batch: dict[str, Any], stage: str) -> None:
        self.compare(self(batch).float(), batch["labels"], stage)

    def compare(self, logits: Tensor, labels: Tensor, stage: str) -> None:
        """Update the stage's metrics. ``logits`` are (..., C), ``labels`` (...); those with -100 do not count."""
        rows, counts = len(labels), labels != IGNORE
        logits, labels = logits[counts], labels[counts]
        self.measure(stage, "loss", F.cross_entropy(logits, labels, reduction="none"), rows=rows)
        for name in ("accuracy", "f1"):
            self.measure(stage, name, logits, labels, rows=rows)

    def best(self, logits: Tensor) -> list[tuple[str, float]]:
        """Return the most probable label and its probability for each row of logits (N, C)."""
        scores, ids = torch.softmax(logits.float(), dim=-1).max(dim=-1)
        names = self.labels
        return [(names[i], round(score, 4)) for i, score in zip(ids.tolist(), scores.tolist(), strict=True)]

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other labels, or of another order.

        Raises:
            ValueError: The labels differ.
        """
        theirs = checkpoint.get("hyper_parameters", {}).get("labels")
        if theirs and self.labels and list(theirs) != self.labels:
            raise ValueError(f"the checkpoint was trained with labels={list(theirs)}, this task has {self.labels}; set model.labels so")
        super().on_load_checkpoint(checkpoint)
