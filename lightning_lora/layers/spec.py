"""``LayerSpec``: what one layer is adapted with. Kinds and variants receive it.

A config describes a whole model; a spec describes one layer (rank, alpha, kind). A variant lists the options that it accepts in
``LoRAConfig.variant_options``, as a table of :class:`Option`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_lora.config import LoRAConfig
from lightning_lora.registry import VARIANTS, look_up


@dataclass(frozen=True)
class Option:
    """One entry that a variant accepts in ``variant_options``.

    Attributes:
        default: the value if the config has none.
        valid: returns True for an allowed value.
        allowed: the allowed values in words, for the error message.
    """

    default: Any
    valid: Callable[[Any], bool]
    allowed: str


@dataclass(frozen=True)
class LayerSpec:
    """One layer's part of a config.

    Attributes:
        config: the model's config.
        rank: r of this layer.
        alpha: numerator of this layer's scaling.
        fqn: the layer's full name in the model; "" for a layer outside a model.
        kind: name of the kind that ``config.kind_pattern`` selects; None: the module's type decides.
        scaling: the factor that multiplies ``B·A``.
    """

    config: LoRAConfig
    rank: int
    alpha: float
    fqn: str = ""
    kind: str | None = None
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


def options_of(config: LoRAConfig) -> dict[str, Any]:
    """Return every option of the config's variant, by name.

    Raises:
        ValueError: the config has an option that the variant does not accept, or a value that is not allowed.
    """
    known: dict[str, Option] = getattr(look_up(VARIANTS, "variant", config.variant), "options", {})
    for name, value in config.variant_options.items():
        if name not in known:
            there = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
            raise ValueError(f"variant_options[{name!r}]={value!r} is not known to variant={config.variant!r}; {there}.")
        if not known[name].valid(value):
            raise ValueError(f"variant_options[{name!r}]={value!r}: give {known[name].allowed}.")
    return {name: option.default for name, option in known.items()} | config.variant_options
