"""Which rows of a fused projection belong to q, k and v, or to gate and up: the layouts of transformers' and timm's classes.

They are read from the class's name and its attributes; neither library is imported. A class that is not listed has no slices: its fused
projection can be adapted as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class FusedLayout:
    """The rows of a fused projection: equal groups one after the other, each with the same parts in the same order.

    Attributes:
        groups: number of groups: 1, or the heads of an interleaved projection.
        parts: name of a part → its number of rows in each group.
    """

    groups: int
    parts: tuple[tuple[str, int], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The parts' names, in order."""
        return tuple(name for name, _ in self.parts)

    @property
    def rows(self) -> int:
        """Number of rows of all parts."""
        return self.groups * sum(size for _, size in self.parts)


def _even(*names: str) -> Callable[[Any, int], FusedLayout]:
    """Parts of the same size, one after the other."""
    return lambda parent, rows: FusedLayout(1, tuple((name, rows // len(names)) for name in names))


def _by_heads(parent: Any, rows: int) -> FusedLayout:
    """One after the other, with fewer heads for k and v: Phi-3."""
    config = parent.config
    kv, queries = (getattr(config, name) * parent.head_dim for name in ("num_key_value_heads", "num_attention_heads"))
    return FusedLayout(1, (("q_proj", queries), ("k_proj", kv), ("v_proj", kv)))


def _interleaved(size: str) -> Callable[[Any, int], FusedLayout]:
    """q, k and v of the first head, then of the next: GPT-NeoX, Bloom. ``size`` is the attribute with a head's size."""

    def layout(parent: Any, rows: int) -> FusedLayout:
        head = getattr(parent, size)
        return FusedLayout(rows // (3 * head), tuple((name, head) for name in QKV))

    return layout


def _falcon(parent: Any, rows: int) -> FusedLayout:
    """Interleaved; the newer models by group of queries with a common k and v; those with one k and v have it at the end."""
    head = parent.head_dim
    if not (parent.new_decoder_architecture or parent.multi_query):
        return _interleaved("head_dim")(parent, rows)
    groups = parent.num_kv_heads if parent.new_decoder_architecture else 1
    return FusedLayout(groups, (("q_proj", parent.num_heads // groups * head), ("k_proj", head), ("v_proj", head)))


def _gpt2(parent: Any, rows: int) -> FusedLayout:
    """q, k and v; attention to an encoder has its q elsewhere."""
    return _even(*(QKV[1:] if parent.is_cross_attention else QKV))(parent, rows)


QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
# Class of the module around it → name of the fused projection → its layout.
_LAYOUTS: dict[str, dict[str, Callable[[Any, int], FusedLayout]]] = {
    "Phi3Attention": {"qkv_proj": _by_heads},
    "Phi3MLP": {"gate_up_proj": _even(*GATE_UP)},
    "GlmMLP": {"gate_up_proj": _even(*GATE_UP)},
    "Glm4MLP": {"gate_up_proj": _even(*GATE_UP)},
    "GPTNeoXAttention": {"query_key_value": _interleaved("head_size")},
    "BloomAttention": {"query_key_value": _interleaved("head_dim")},
    "PersimmonAttention": {"query_key_value": _interleaved("head_dim")},
    "FalconAttention": {"query_key_value": _falcon},
    "GPT2Attention": {"c_attn": _gpt2},
    "ModernBertAttention": {"Wqkv": _even(*QKV)},
    "MptAttention": {"Wqkv": _even(*QKV)},
}
_TIMM = {"Attention": {"qkv": _even(*QKV)}}  # vision_transformer, and what is built from its attention
_LIBRARIES = {"transformers": _LAYOUTS, "timm": _TIMM}


def fused_layouts(parent: nn.Module) -> dict[str, FusedLayout]:
    """Return name of a child → the layout of its rows, for children that are fused projections."""
    for cls in type(parent).__mro__:
        known = _LIBRARIES.get(cls.__module__.partition(".")[0], {}).get(cls.__name__)
        if known is not None:
            children = {name: parent._modules.get(name) for name in known}
            return {name: known[name](parent, _rows(child)) for name, child in children.items() if child is not None}
    return {}


def _rows(projection: nn.Module) -> int:
    """Return the number of outputs of a linear or of Hugging Face's ``Conv1D``."""
    return int(getattr(projection, "out_features", None) or projection.nf)  # type: ignore[arg-type]
