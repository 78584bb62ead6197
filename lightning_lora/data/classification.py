"""Texts with one label each, for sequence classification."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from typing_extensions import override

from lightning_lora.data.batching import Example, cut_ids, pad_right
from lightning_lora.data.labels import LabelDataModule
from lightning_lora.data.records import Labelled, PlainText, Record
from lightning_lora.data.shown import Part, text_of


class ClassificationDataModule(LabelDataModule):
    """Rows with a ``text`` and a ``label``. Arguments are those of `FileDataModule`; prediction needs no labels.

    Examples:
        >>> data = ClassificationDataModule("rows/labels.jsonl", val=0.25, batch_size=3)
        >>> task = SequenceClassificationTask("models/bert")
        >>> L.Trainer(max_epochs=1, callbacks=[LoRACallback(LoRAConfig(target_modules="all-linear"))]).fit(task, data)
        >>> next(iter(data.train_dataloader()))["labels"].shape
        torch.Size([3])
    """

    records = (Labelled, PlainText)

    @override
    def labels_of(self, record: Any) -> Iterable[Any]:
        if isinstance(record, PlainText):
            raise ValueError("the row has no 'label'; add it, or name its column with data.columns")
        return [record.label]

    @override
    def encode(self, record: Record, split: str) -> Sequence[Example]:
        assert isinstance(record, (Labelled, PlainText))
        if not record.text.strip():
            return []
        ids = self.tokenizer(record.text)["input_ids"]
        if split == "predict":
            return [Example(ids, text=record.text)]
        return [Example(ids, [self.id_of(label) for label in self.labels_of(record)])]

    @override
    def fits(self, example: Example, split: str) -> str | None:
        if len(example) <= self.max_length:
            return None
        example.ids = cut_ids(example.ids, self.max_length, self.tokenizer)
        return "cut"

    @override
    def parts(self, example: Example) -> Iterator[Part]:
        yield f"{text_of(self.tokenizer, example.ids)} ", False
        yield from ((self.name_of_id(label), True) for label in example.labels)

    @override
    def collate(self, examples: Sequence[Example], split: str) -> dict[str, Any]:
        batch: dict[str, Any] = pad_right([e.ids for e in examples], self.tokenizer.pad_token_id, self.pad_to_multiple_of)
        if split == "predict":
            return {**batch, "texts": [e.text for e in examples]}
        return {**batch, "labels": torch.tensor([e.labels[0] for e in examples])}
