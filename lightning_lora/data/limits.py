"""Refuse rows that a model cannot read, before the first step: its lookups would fail in the middle of a run, on a GPU without a reason."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from lightning_lora.data.store import Examples

TOKENS = ("ids", "chosen", "rejected")  # fields of examples that hold tokens which the model reads
_POSITIONS = re.compile(r"(.*\.)?(wpe|\w*position_embeddings?|embed_positions)")


def check_limits(model: Any, tokenizer: Any, examples: Examples, where: str) -> None:
    """Check encoded rows against a model of transformers; any other module is passed over.

    Args:
        model: The model.
        tokenizer: Its tokenizer, or what encoded the rows.
        examples: The rows.
        where: What the rows are, for errors.

    Raises:
        ValueError: A row is longer than the model has learned positions, or has a token beyond its embeddings.
    """
    places, longest = learned_positions(model), max(examples.lengths)
    if places is not None and longest > places:
        raise ValueError(
            f"{where}: the longest row has {longest} tokens, and the model's position embeddings end at {places}; "
            f"set data.max_length: {places}"
        )
    for name in TOKENS:
        if name in examples.columns and len(examples.columns[name]):
            check_token(model, tokenizer, int(examples.columns[name].max()), where)


def check_token(model: Any, tokenizer: Any, largest: int, where: str) -> None:
    """Raise ValueError if a token is beyond a model's embeddings, as one that was added to the tokenizer alone."""
    try:
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:  # of a model that reads no tokens, as transformers' ResNet
        return
    rows = getattr(embedding, "num_embeddings", None)
    if rows is not None and largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"{where}: the token {token!r} has the id {largest}, and the model only {rows} embeddings; use the model's own tokenizer and "
            "template, or call resize_token_embeddings and save the model with this tokenizer"
        )


def learned_positions(model: Any) -> int | None:
    """Return the longest row that a model has position embeddings for; None if it computes positions (rotary, ALiBi) or is none.

    An image tower has such embeddings too, but not as many as the text's configuration says.
    """
    config: Any = getattr(model, "config", None)
    most = getattr(config.get_text_config(), "max_position_embeddings", None) if hasattr(config, "get_text_config") else None
    if not isinstance(most, int):
        return None
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.fullmatch(name) and most <= module.num_embeddings <= most + 2:
            before = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1  # OPT and BART; RoBERTa
            found.append(module.num_embeddings - before)
    return min(found, default=None)
