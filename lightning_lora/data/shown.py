"""Encoded examples as text for people: in parts, each with whether it is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from lightning_lora.ops.cross_entropy import IGNORE

Part = tuple[str, bool]


def by_token(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> Iterator[Part]:
    """Yield the parts of a row whose labels stand at its tokens. Without labels nothing is learnt."""
    learnt = [label != IGNORE for label in labels] or [False] * len(ids)
    for flag, tokens in groupby(zip(ids, learnt, strict=True), key=lambda pair: pair[1]):
        yield text_of(tokenizer, [token for token, _ in tokens]), flag


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return tokens as text, special ones included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))
