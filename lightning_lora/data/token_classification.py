"""Texts with a label per word, for token classification: named entities, parts of speech."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from typing_extensions import override

from lightning_lora.data.batching import Example, cut_ids, pad_right
from lightning_lora.data.labels import LabelDataModule
from lightning_lora.data.records import Record, Tagged
from lightning_lora.data.shown import Part, text_of
from lightning_lora.ops.cross_entropy import IGNORE


class TokenClassificationDataModule(LabelDataModule):
    """Rows with ``tokens``, the words of a text, and ``tags``, a label for each. Arguments are those of `FileDataModule`.

    The words are tokenized together, separated by spaces. A word's label stands on its first token; its other tokens do not count.

    Examples:
        >>> data = TokenClassificationDataModule("rows/tags.jsonl", batch_size=2)
        >>> task = TokenClassificationTask("models/bert")
        >>> L.Trainer(max_epochs=1, callbacks=[LoRACallback(LoRAConfig(target_modules="all-linear"))]).fit(task, data)
        >>> next(iter(data.train_dataloader()))["labels"].shape  # (B, T)
        torch.Size([2, 4])
    """

    records = (Tagged,)

    @override
    def labels_of(self, record: Any) -> Iterable[Any]:
        return record.tags

    @override
    def encode(self, record: Record, split: str) -> Sequence[Example]:
        assert isinstance(record, Tagged)
        if not record.tokens:
            return []
        ids, first = first_tokens(self.tokenizer, record.tokens)
        labels = [IGNORE] * len(ids)
        for place, tag in zip(first, [0] * len(first) if split == "predict" else map(self.id_of, record.tags), strict=True):
            labels[place] = tag
        return [Example(ids, labels, text="\t".join(record.tokens) if split == "predict" else "")]

    @override
    def fits(self, example: Example, split: str) -> str | None:
        if len(example) <= self.max_length:
            return None
        ids = cut_ids(example.ids, self.max_length, self.tokenizer)
        kept = next((i for i, (mine, theirs) in enumerate(zip(ids, example.ids, strict=False)) if mine != theirs), len(ids))
        example.labels = example.labels[:kept] + [IGNORE] * (len(ids) - kept)
        example.ids = ids
        return "lost" if split == "predict" else "cut"

    @override
    def parts(self, example: Example) -> Iterator[Part]:
        for token, label in zip(example.ids, example.labels, strict=True):
            yield text_of(self.tokenizer, [token]), False
            if label != IGNORE:
                yield self.name_of_id(label), True

    @override
    def collate(self, examples: Sequence[Example], split: str) -> dict[str, Any]:
        batch: dict[str, Any] = pad_right([e.ids for e in examples], self.tokenizer.pad_token_id, self.pad_to_multiple_of)
        length = batch["input_ids"].shape[1]
        batch["labels"] = torch.tensor([e.labels + [IGNORE] * (length - len(e.labels)) for e in examples])
        return {**batch, "words": [e.text.split("\t") for e in examples]} if split == "predict" else batch


def first_tokens(tokenizer: Any, words: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the token ids of words that are separated by spaces, and the index of each word's first token: the first with a letter of it.

    Raises:
        ValueError: The tokenizer cannot tell where its tokens are, or a word has no token of its own.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not tell which token belongs to which word; use a model with a fast tokenizer")
    encoded = tokenizer(" ".join(words), return_offsets_mapping=True)
    spans = encoded["offset_mapping"]
    first: list[int] = []
    position = start = 0
    for word in words:
        end = start + len(word)
        while position < len(spans) and (spans[position][1] <= start or spans[position][0] == spans[position][1]):
            position += 1
        if position == len(spans) or spans[position][0] >= end or position in first[-1:]:
            raise ValueError(f"the word {word!r:.40} has no token of its own; leave it out of 'tokens', or join it with its neighbour")
        first.append(position)
        start = end + 1
    return encoded["input_ids"], first
