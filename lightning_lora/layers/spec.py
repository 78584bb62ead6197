"""``LayerSpec``: what one layer is to be adapted with, as kinds and variants are asked with it.

A config says it for a whole model; here it is worked out for one layer (rank, alpha, kind). A variant says which options it takes in
``LoRAConfig.variant_options``: a table of :class:`Option`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_lora.config import LoRAConfig
from lightning_lora.registry import VARIANTS, look_up


@dataclass(frozen=True)
class Option:
    """One entry that a variant takes in ``variant_options``.

    Attributes:
        default: its value where the config has none.
        valid: whether a value may be used.
        allowed: what may be, in words, for the error message.
    """

    default: Any
    valid: Callable[[Any], bool]
    allowed: str


@dataclass(frozen=True)
class LayerSpec:
    """One layer's part of a config.

    Attributes:
        config: of the model.
        rank: r of this layer.
        alpha: scaling numerator of this layer.
        fqn: the layer's full name in the model; "" for one that stands alone.
        kind: name of the kind that ``config.kind_pattern`` chooses; None: by the module's type.
        scaling: the factor in front of ``B·A``.
    """

    config: LoRAConfig
    rank: int
    alpha: float
    fqn: str = ""
    kind: str | None = None
    scaling: float = field(init=False, compare=False)  # worked out once, for every forward pass reads it

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


def options_of(config: LoRAConfig) -> dict[str, Any]:
    """Every option of the config's variant, by name.

    Raises:
        ValueError: the variant does not take one that the config has, or not with that value.
    """
    known: dict[str, Option] = getattr(look_up(VARIANTS, "variant", config.variant), "options", {})
    for name, value in config.variant_options.items():
        if name not in known:
            there = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
            raise ValueError(f"variant_options[{name!r}]={value!r} is not known to variant={config.variant!r}; {there}.")
        if not known[name].valid(value):
            raise ValueError(f"variant_options[{name!r}]={value!r}: give {known[name].allowed}.")
    return {name: option.default for name, option in known.items()} | config.variant_options
