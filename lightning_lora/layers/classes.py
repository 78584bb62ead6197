"""Builds the class of an adapted layer: a subclass of the layer's original class, created on first use.

``Linear4bit`` with DoRA is ``DoRALinear4bit(DoRA, LoRALinear, Linear4bit)``: the variant changes the formula of the kind, and the kind
calls the base. All layers with the same three parts share one class, so that compilers trace it once. A pickle names base and
variant instead of the class, because another process may not have created the class yet.
"""

from __future__ import annotations

from functools import wraps
from inspect import Parameter, signature
from typing import Any

from torch import nn

from lightning_lora.layers.slices import Sliced
from lightning_lora.registry import KIND_NAMES, VARIANTS, kind_of, look_up

_CLASSES: dict[tuple[type, type, type, bool], type[Any]] = {}
_UNDONE: dict[tuple[type, str], type[Any]] = {}


def adapted_class(cls: type[nn.Module], variant: str, kind_name: str | None = None, *, sliced: bool = False) -> type[Any] | None:
    """Return the class that modules of ``cls`` (adapted or not) get with this variant; None if no kind adapts them.

    Args:
        cls: class of the module.
        variant: name of the variant.
        kind_name: name of the kind; by default the class decides.
        sliced: the adapter is on slices of a fused projection.

    Raises:
        ValueError: there is no such variant or kind.
    """
    base = getattr(cls, "lora_base", cls)
    kind = kind_of(cls) if kind_name is None else look_up(KIND_NAMES, "kind_pattern: kind", kind_name)
    mixin = look_up(VARIANTS, "variant", variant)
    return None if kind is None else lora_class(base, kind, mixin if getattr(kind, "low_rank", True) else object, sliced)


def lora_class(base: type[nn.Module], kind: type, variant: type, sliced: bool = False) -> type[Any]:
    """Return the subclass of ``base`` with this kind and this variant's mixin, and with that of slices before them."""
    key = (base, kind, variant, sliced)
    if key not in _CLASSES:
        first = variant.__name__ if variant is not object else "LoRA" if getattr(kind, "low_rank", True) else kind.__name__
        name = first + base.__name__
        own = {"__module__": base.__module__, "lora_base": base}
        if hasattr(kind, "weight_kind"):  # the variant changes the formula of each weight, not of the module that holds them
            own["weight_class"] = lora_class(nn.Module, kind.weight_kind, variant)
            _CLASSES[key] = type(name, (kind, base), own)
        elif variant is object and not sliced and issubclass(kind, base):
            _CLASSES[key] = kind  # LoRALinear is itself the class for nn.Linear
        else:
            parents = [
                cls
                for cls in (Sliced if sliced else object, variant, kind, base)
                if cls is not object and not (cls is base and issubclass(kind, base))
            ]
            _CLASSES[key] = type(name, tuple(parents), own)
            _name_input_as_base_does(_CLASSES[key])
    return _CLASSES[key]


def _name_input_as_base_does(cls: type[Any]) -> None:
    """Let callers pass the input by the name that the base's forward has for it, as Hugging Face's ``Conv1D`` has ``x``."""
    name, parameter = [*signature(cls.lora_base.forward).parameters.items(), ("", None)][1]
    inner = cls.forward
    if parameter is None or parameter.kind is not Parameter.POSITIONAL_OR_KEYWORD or name == "input":
        return

    @wraps(cls.lora_base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(self, *args, **kwargs) if args or name not in kwargs else inner(self, kwargs.pop(name), **kwargs)

    cls.forward = forward


def strip_class(cls: type[Any], mark: str) -> type[Any]:
    """Undo one class replacement: return the class before it, which the attribute ``mark`` of our class holds.

    If another subclass was put on top since, as FSDP2 does, return that subclass rebuilt over the original class.
    """
    if mark in vars(cls):
        return getattr(cls, mark)
    if (cls, mark) not in _UNDONE:
        bases = tuple(getattr(base, mark, base) for base in cls.__bases__)
        _UNDONE[(cls, mark)] = type(cls.__name__, bases, {name: value for name, value in vars(cls).items() if name != "__doc__"})
    return _UNDONE[(cls, mark)]
