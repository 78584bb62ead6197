"""Turn a module into its LoRA subclass, in place (``adapt``), and back into the plain module (``unadapt``).

``refusal`` says why a module cannot be adapted. ``shallow_copy`` is for callers that must not modify the module.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lora.layers.awaiting import data_came
from lightning_lora.layers.base import PREFIX, LoRALayer
from lightning_lora.layers.classes import adapted_class, strip_class
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.layers.state import AdapterState
from lightning_lora.quantization.formats import format_of, prepare, unknown_storage, why_not_prepared
from lightning_lora.registry import qualified_name, why_refused

COMPUTED_BY = "a parametrization, weight_norm or a wrapper"


def refusal(module: nn.Module, spec: LayerSpec) -> str | None:
    """Return why this module cannot be adapted, as a whole sentence; None if it can."""
    kind = adapted_class(type(module), spec.config.variant, spec.kind, sliced=spec.slices is not None)
    fqn, name = spec.fqn, qualified_name(type(module))
    if kind is None:
        return why_refused(module, fqn)
    if (unfit := kind.unfit(module)) is not None:
        return f"{fqn!r} ({name}): {unfit}. Exclude it."
    if "forward" in module.__dict__:
        reason = why_not_prepared(module)  # of a library that sets one
        if reason is not None:
            return f"{fqn!r} ({name}): {reason}."
        return f"{fqn!r} ({name}) has a forward of its own set on the instance, which would bypass the adapter; remove that hook first."
    if computed := computed_weights(module, kind):
        return f"{fqn!r} ({name}) computes its {computed[0]} anew at each call ({COMPUTED_BY}); remove that first."
    if any(isinstance(module._parameters[part], nn.parameter.UninitializedParameter) for part in kind.adapted):
        return f"{fqn!r} ({name}) is lazy and has no shape yet; run one forward pass before applying LoRA."
    for part in kind.adapted:
        if (stored := unknown_storage(module, part)) is not None:
            return (
                f"{fqn!r} ({name}) stores its {part} as {stored}, which is neither plain floating point nor a format known here:"
                " dequantize the base first, or load it in a format that quantize_base names."
            )
    if (misfit := why_another_shape(module, kind)) is not None:
        return f"{fqn!r} ({name}): {misfit}: set them to the weight's."
    try:
        kind.check(module, spec)
    except ValueError as error:
        return f"{fqn!r} ({name}): {error}."
    return None


def why_another_shape(module: nn.Module, kind: type[LoRALayer]) -> str | None:
    """Return how a module's weight differs from the sizes that determine the adapter's shapes; None if it does not."""
    declared, weight = kind.weight_shape(module), module._parameters.get("weight")
    if declared is None or weight is None or format_of(module) is not None:  # a packed weight has another shape
        return None
    shape = tuple(weight.shape)
    if len(shape) != len(declared) or shape == declared:  # FSDP1 leaves a flat weight
        return None
    return f"its weight has shape {shape}, but {', '.join(kind.sizes)} say {declared}, as after pruning"


def computed_weights(module: nn.Module, kind: type[LoRALayer]) -> list[str]:
    """Return the names of the weights that a kind adapts and that are no parameters of this module, since something computes them."""
    return [part for part in kind.adapted if module._parameters.get(part) is None]


def adapt(module: nn.Module, spec: LayerSpec) -> LoRALayer:
    """Turn a module into its LoRA subclass, in place. The caller has checked it with :func:`refusal`."""
    prepare(module)  # may change its class
    cls = adapted_class(type(module), spec.config.variant, spec.kind, sliced=spec.slices is not None)
    assert cls is not None
    module.__class__ = cls
    assert isinstance(module, LoRALayer)
    try:
        module.init_adapter(spec)
    except BaseException:
        unadapt(module)
        raise
    return module


def unadapt(layer: LoRALayer) -> nn.Module:
    """Turn a layer back into the plain module, in place. The weight keeps its current value; the adapter is removed."""
    for container in (layer._parameters, layer._modules, layer.__dict__):
        for name in [name for name in container if name.startswith(PREFIX)]:
            del container[name]
    data_came(layer)
    cls: Any = type(layer)
    layer.__class__ = strip_class(cls, "lora_base") if hasattr(cls, "unshard") else cls.lora_base  # keep FSDP2's subclass, over the base
    return layer


def shallow_copy(module: nn.Module) -> Any:
    """Return a new module of the same class over the same tensors, with its own containers.

    No constructor and no hook runs.
    """
    new = object.__new__(module.__class__)  # FSDP2's classes have a constructor in `__new__`
    own = (dict, AdapterState)  # the copy may change these without changing the original
    new.__dict__.update({name: value.copy() if isinstance(value, own) else value for name, value in module.__dict__.items()})
    return new
