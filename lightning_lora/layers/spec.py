"""``LayerSpec``: what one layer is adapted with. Kinds and variants receive it.

A config describes a whole model; a spec describes one layer (rank, alpha, kind). A variant lists the options that it accepts in
``LoRAConfig.variant_options``, and a kind those in ``LoRAConfig.kind_options``, as a table of :class:`Option`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.registry import KIND_NAMES, VARIANTS, init_of, look_up
from lightning_lora.utils.fused_layouts import FusedLayout


@dataclass(frozen=True)
class Option:
    """One entry that a variant accepts in ``variant_options``, an init in ``init_options``, or a kind in ``kind_options``.

    Attributes:
        default: the value if the config has none.
        valid: returns True for an allowed value.
        allowed: the allowed values in words, for the error message.
    """

    default: Any
    valid: Callable[[Any], bool]
    allowed: str


@dataclass(frozen=True)
class Slices:
    """The slices of a fused projection that have an adapter each.

    Attributes:
        layout: the rows of all its parts.
        names: the parts that are adapted, in the layout's order.
    """

    layout: FusedLayout
    names: tuple[str, ...]

    @property
    def sizes(self) -> list[int]:
        """Number of rows of each slice."""
        return [self.layout.groups * size for name, size in self.layout.parts if name in self.names]

    @property
    def rows(self) -> int:
        """Number of rows of the slices."""
        return sum(self.sizes)

    def placed(self, B: Tensor) -> Tensor:
        """Return the block form (out, n·r) of a B that is stored slice after slice (rows of the slices, r)."""
        rank, many, groups = B.shape[1], len(self.names), self.layout.groups
        own = iter(B.split(self.sizes))
        blocks = [
            F.pad(next(own).view(groups, size, rank), ((i := self.names.index(name)) * rank, (many - 1 - i) * rank))
            if name in self.names
            else B.new_zeros(groups, size, many * rank)
            for name, size in self.layout.parts
        ]
        return torch.cat(blocks, 1).flatten(0, 1)

    def taken(self, blocks: Tensor) -> Tensor:
        """Invert :meth:`placed`.

        Raises:
            ValueError: the shape is not that of a block form, or there are other values than zeros beside the blocks.
        """
        rank, rest = divmod(blocks.shape[1], len(self.names)) if blocks.ndim == 2 else (0, 1)
        if rest or blocks.shape[0] != self.layout.rows:
            raise ValueError(f"{tuple(blocks.shape)} is not B of {', '.join(self.names)} on {self.layout.rows} rows")
        parts = blocks.unflatten(0, (self.layout.groups, -1)).split([size for _, size in self.layout.parts], 1)
        named = dict(zip(self.layout.names, parts, strict=True))
        B = torch.cat([named[name][..., i * rank : (i + 1) * rank].flatten(0, 1) for i, name in enumerate(self.names)])
        if not torch.equal(self.placed(B), blocks):
            raise ValueError(f"it has values outside the rows of {', '.join(self.names)}: the file is of an adapter on the whole layer")
        return B


@dataclass(frozen=True)
class LayerSpec:
    """One layer's part of a config.

    Attributes:
        config: the model's config.
        rank: r of this layer.
        alpha: numerator of this layer's scaling.
        fqn: the layer's full name in the model; "" for a layer outside a model.
        kind: name of the kind that ``config.kind_pattern`` selects; None: the module's type decides.
        slices: the slices that are adapted, if the layer is a fused projection; None: all of it, with one A and B.
        rows: numbers of the weight's rows that train, in place of A and B (:mod:`lightning_lora.layers.token_rows`).
        rows_of: FQN of the tied layer that has these rows; "": the layer itself.
        scaling: the factor that multiplies ``B·A``.
    """

    config: LoRAConfig
    rank: int
    alpha: float
    fqn: str = ""
    kind: str | None = None
    slices: Slices | None = None
    rows: tuple[int, ...] = ()
    rows_of: str = ""
    scaling: float = field(init=False, compare=False)  # computed once, because every forward pass reads it

    def __post_init__(self) -> None:
        object.__setattr__(self, "scaling", self.config.scaling_of(self.rank, self.alpha))

    @property
    def dropout(self) -> float:
        """Probability of zeroing an entry of the adapter's input."""
        return self.config.dropout

    @property
    def options(self) -> dict[str, Any]:
        """The variant's options, defaults included."""
        return options_of(self.config)

    @property
    def init_options(self) -> dict[str, Any]:
        """The init's options, defaults included."""
        return init_options_of(self.config)


def options_of(config: LoRAConfig) -> dict[str, Any]:
    """Return every option of the config's variant, by name.

    Raises:
        ValueError: the config has an option that the variant does not accept, or a value that is not allowed.
    """
    known: dict[str, Option] = getattr(look_up(VARIANTS, "variant", config.variant), "options", {})
    return _checked(known, config.variant_options, "variant_options", f"variant={config.variant!r}")


def init_options_of(config: LoRAConfig) -> dict[str, Any]:
    """Return every option of the config's init, by name.

    Raises:
        ValueError: the config has an option that the init does not accept, or a value that is not allowed.
    """
    known: dict[str, Option] = getattr(init_of(config.init), "options", {})
    return _checked(known, config.init_options, "init_options", f"init={config.init!r}")


def kind_options_of(config: LoRAConfig, name: str) -> dict[str, Any]:
    """Return every option of a kind, by name.

    Raises:
        ValueError: there is no such kind, or it does not accept an option of the config's or its value.
    """
    known: dict[str, Option] = getattr(look_up(KIND_NAMES, "kind_options: kind", name), "kind_options", {})
    return _checked(known, config.kind_options.get(name, {}), f"kind_options[{name!r}]", f"kind {name!r}")


def check_options(config: LoRAConfig) -> None:
    """Raise ValueError for an option that the variant, the init or a kind does not accept, and for an unknown one of these."""
    options_of(config)
    init_options_of(config)
    for name in config.kind_pattern.values():
        look_up(KIND_NAMES, "kind_pattern: kind", name)
    for name in config.kind_options:
        kind_options_of(config, name)


def _checked(known: dict[str, Option], given: dict[str, Any], field: str, owner: str) -> dict[str, Any]:
    for name, value in given.items():
        if name not in known:
            there = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
            raise ValueError(f"{field}[{name!r}]={value!r} is not known to {owner}; {there}.")
        if not known[name].valid(value):
            raise ValueError(f"{field}[{name!r}]={value!r}: give {known[name].allowed}.")
    return {name: option.default for name, option in known.items()} | given
