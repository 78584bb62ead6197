"""Give every word of a text a label: named entities, parts of speech.

A word's label stands on its first token, and the others do not count. Entities are compared as wholes: ``{val,test}_entity_f1`` counts
those whose type and both ends are right, as conlleval does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_lora.ops.cross_entropy import IGNORE
from lightning_lora.tasks.labels import LabelTask

Entity = tuple[str, int, int]


class TokenClassificationTask(LabelTask):
    """A Hugging Face model that gives every word of a text a label. Arguments and metrics are those of `LabelTask`.

    If the labels are of the forms ``O``, ``B-type`` and ``I-type``, also log ``{val,test}_entity_f1``. Prediction gives the words and their
    labels.

    Examples:
        >>> task = TokenClassificationTask("models/bert", learning_rate=1e-3)
        >>> trainer = L.Trainer(max_epochs=1, callbacks=[LoRACallback(LoRAConfig(target_modules="all-linear"))])
        >>> trainer.fit(task, TokenClassificationDataModule("rows/tags.jsonl"))
        >>> task.labels
        ['B-COLOUR', 'B-FRUIT', 'O']
    """

    auto_class = "AutoModelForTokenClassification"
    data_class = "lightning_lora.data.TokenClassificationDataModule"
    inputs = ("input_ids", "attention_mask", "token_type_ids")

    @override
    def make_metrics(self) -> dict[str, Metric]:
        entities: dict[str, Metric] = {"entity_f1": EntityF1()} if self._has_entities() else {}
        return {**super().make_metrics(), **entities}

    def _has_entities(self) -> bool:
        return all(name == "O" or name[:2] in ("B-", "I-") for name in self.labels)

    @override
    def compare(self, logits: Tensor, labels: Tensor, stage: str) -> None:
        super().compare(logits, labels, stage)
        if f"{stage}_entity_f1" in self.metrics:
            found = self._names(logits.argmax(dim=-1), labels)
            self.measure(stage, "entity_f1", found, self._names(labels, labels), rows=len(labels))

    def _names(self, ids: Tensor, labels: Tensor) -> list[list[str]]:
        """Return the labels' names of each row, where it has labels."""
        names = self.labels
        return [[names[i] for i in row[own != IGNORE].tolist()] for row, own in zip(ids, labels, strict=True)]

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Return the words of each text and their labels."""
        tags = self._names(self(batch).argmax(dim=-1), batch["labels"])  # which only tells where words begin
        return [{"tokens": words, "tags": names} for words, names in zip(batch["words"], tags, strict=True)]


class EntityF1(Metric):
    """F1 of whole entities, over all texts ("micro").

    ``update`` takes the names of the predicted and of the true labels, one list per text.
    """

    right: Tensor
    found: Tensor
    there: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("right", "found", "there"):
            self.add_state(name, default=torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> None:
        for mine, theirs in zip(map(entities, predicted), map(entities, true), strict=True):
            self.right += len(mine & theirs)
            self.found += len(mine)
            self.there += len(theirs)

    @override
    def compute(self) -> Tensor:
        return 2 * self.right / (self.found + self.there).clamp(min=1)


def entities(names: Sequence[str]) -> set[Entity]:
    """Return the entities that labels mark: (type, first word, word behind the last).

    An ``I-`` that does not continue an entity of its type begins one, as in conlleval.
    """
    found: set[Entity] = set()
    kind, start = "", 0
    for i, name in enumerate([*names, "O"]):
        mark, _, its = name.partition("-")
        if kind and (mark != "I" or its != kind):
            found.add((kind, start, i))
            kind = ""
        if mark != "O" and not kind:
            kind, start = its, i
    return found
