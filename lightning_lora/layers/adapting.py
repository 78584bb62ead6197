"""A module becomes its LoRA subclass, in place, and the plain module again; and why it cannot. Who may not change it takes a twin."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import PREFIX, LoRALayer
from lightning_lora.layers.classes import adapted_class, strip_class
from lightning_lora.quantization.formats import unknown_storage
from lightning_lora.registry import qualified_name, why_refused


def refusal(module: nn.Module, fqn: str, rank: int, dropout: float, variant: str = "plain") -> str | None:
    """Why this module cannot be adapted, as a whole sentence; None if it can."""
    kind = adapted_class(type(module), variant)
    name = qualified_name(type(module))
    if kind is None:
        return why_refused(module, fqn)
    if "forward" in module.__dict__:
        return f"{fqn!r} ({name}) has a forward of its own set on the instance, which would bypass the adapter; remove that hook first."
    weight = module._parameters.get("weight")
    if weight is None:
        return f"{fqn!r} ({name}) computes its weight anew at each call (a parametrization, weight_norm or a wrapper); remove that first."
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return f"{fqn!r} ({name}) is lazy and has no shape yet; run one forward pass before applying LoRA."
    if (stored := unknown_storage(module)) is not None:
        return (
            f"{fqn!r} ({name}) stores its weight as {stored}, which is neither plain floating point nor a format known here:"
            " dequantize the base first, or load it in a format that quantize_base names."
        )
    try:
        kind.check(module, rank, dropout)
    except ValueError as error:
        return f"{fqn!r} ({name}): {error}."
    return None


def adapt(module: nn.Module, config: LoRAConfig, rank: int, alpha: float) -> LoRALayer:
    """Turn a module into its LoRA subclass, in place; the caller has checked it with :func:`refusal`."""
    cls = adapted_class(type(module), config.variant)
    assert cls is not None
    module.__class__ = cls
    assert isinstance(module, LoRALayer)
    module.init_adapter(config, rank, alpha)
    return module


def unadapt(layer: LoRALayer) -> nn.Module:
    """The plain module again, in place, with the weight it has now; the adapter is dropped."""
    for name in (
        "rank",
        "alpha",
        "merged",
        "merge_loss",
        "_undo",
        "_owns_weight",
        "_untied",
        "_digest",
        "_device",
        "_quantized",
    ):
        layer.__dict__.pop(name, None)
    for container in (layer._parameters, layer._modules, layer.__dict__):
        for name in [name for name in container if name.startswith(PREFIX)]:
            del container[name]
    cls: Any = type(layer)
    layer.__class__ = strip_class(cls, "lora_base") if hasattr(cls, "unshard") else cls.lora_base  # FSDP2's stays on top of the base
    return layer


def shallow_copy(module: nn.Module) -> Any:
    """Another module of the same class over the same tensors, with containers of its own; no constructor runs, no hook."""
    new = module.__class__.__new__(module.__class__)
    new.__dict__.update({name: value.copy() if isinstance(value, dict) else value for name, value in module.__dict__.items()})
    return new
