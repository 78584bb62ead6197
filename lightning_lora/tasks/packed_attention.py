"""An attention for transformers' models that keeps the documents of packed rows apart without a mask.

Its name in transformers is ``lightning_lora_varlen``. In packed rows it is :mod:`lightning_lora.ops.varlen_attention`; in all others it is
transformers' ``sdpa``, masks included. So a model keeps it for validation and generation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightning_lora.ops.varlen_attention import varlen_attention
from lightning_lora.utils.transformers_conventions import attention_implementation, attention_tables

NAME = "lightning_lora_varlen"
_LEAVES_OUT = ("softcap", "s_aux", "position_bias")  # what some models add to the scores


class _Rows:
    """Whether the running forward pass has packed rows. The mask functions of transformers are not told."""

    packed = False


@contextmanager
def packed_rows() -> Iterator[None]:
    """Make no masks for this attention in the forward passes within."""
    before, _Rows.packed = _Rows.packed, True
    try:
        yield
    finally:
        _Rows.packed = before


def register() -> str:
    """Enter the attention into transformers' tables. Return its name."""
    functions, masks = attention_tables()
    sdpa, sdpa_mask = functions()["sdpa"], masks()["sdpa"]

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        if cu_seq_lens_q is None or max_length_q is None:
            return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        extra = [name for name in _LEAVES_OUT if others.get(name) is not None]
        if extra or not causal or query.shape[2] != key.shape[2]:
            raise ValueError(f"{type(module).__name__} has {', '.join(extra) or 'no causal attention'}, which {NAME} does not compute.")
        options: dict[str, Any] = {"scale": scaling, "window": sliding_window, "dropout": dropout}
        found = varlen_attention(query, key, value, cu_seq_lens_q, max_length_q, **options)
        return found.transpose(1, 2).contiguous(), None

    def mask(*args: Any, **options: Any) -> Any:
        return None if _Rows.packed else sdpa_mask(*args, **options)

    functions.register(NAME, attention)
    masks.register(NAME, mask)
    return NAME


def use_attention(model: Any, name: str) -> None:
    """Set the model's attention.

    Raises:
        ValueError: transformers does not know it, its package is not installed, or the model has one attention only.
    """
    try:
        model.set_attn_implementation(name)
    except (ImportError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split()).strip("'\".")
    else:
        if attention_implementation(model) == name:
            return
        reason = f"{type(model).__name__} does not let its attention be set"
    raise ValueError(f"model.attn_implementation={name!r}: {reason}. Leave it out, or use sdpa or eager.")
