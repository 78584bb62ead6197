"""Recognise the parts of a block whose adapted linears can share work. On by default; :func:`unfuse` undoes it.

Linears that read the same input (q, k, v) share the pass over it. On a GPU a gated MLP is computed as one operation.

Parameters stay in their layers and state dicts are unchanged. Whatever does not fit (DoRA with dropout, a sharded base, a quantized one
whose products nobody knows how to take, merged layers, inputs that differ after all) is computed layer by layer, as if this had not been
called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers import LoRALinear
from lightning_lora.layers.classes import strip_class
from lightning_lora.layers.shared_input import SharedInputGroup
from lightning_lora.ops import backends
from lightning_lora.ops.frozen_weight import FrozenWeight
from lightning_lora.ops.fused_linear import serves
from lightning_lora.ops.gated_mlp import lora_gated_mlp
from lightning_lora.utils.forward_source import calls_together, is_gated_mlp


def fuse(model: nn.Module) -> list[SharedInputGroup]:
    """Let adapted linears that read the same input share it.

    Args:
        model: a model with adapters; its forward passes are not changed, its layers' are.

    Returns:
        The groups there are now.
    """
    unfuse(model)
    groups = []
    for parent in list(model.modules()):
        adapted = {name: child for name, child in parent.named_children() if isinstance(child, LoRALinear)}
        families = calls_together(type(parent)) if len(adapted) > 1 else []
        sets = [[adapted[name] for name in family if name in adapted] for family in families]
        mine = [SharedInputGroup(layers) for layers in sets if len(layers) > 1]
        for group in mine:
            for layer in group.layers:
                layer.shared_input = group
        mixins = [*([GatedMLP] if _is_gated_mlp(parent) else []), *([Sharing] if mine else [])]
        if mixins and not isinstance(parent, (Sharing, GatedMLP)):
            parent.__dict__["lora_groups"] = mine
            parent.__class__ = _fused_class(type(parent), *mixins)
        groups += mine
    return groups


def unfuse(model: nn.Module) -> None:
    """Compute every adapted linear by itself again, until LoRA is applied anew.

    Args:
        model: an adapted model; one that shares nothing stays as it is.
    """
    for module in model.modules():
        if isinstance(module, LoRALinear) and module.shared_input is not None:
            module.shared_input.dissolve()
        if isinstance(module, (Sharing, GatedMLP)):
            del module.__dict__["lora_groups"]
            module.__class__ = strip_class(type(module), "fused_base")


class Sharing(nn.Module):
    """A mixin before the class of a module with siblings: they share while its forward runs."""

    lora_groups: list[SharedInputGroup]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the base's, which may want arguments: what is made here is no subclass of the user's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class that the module had."""
        for group in self.lora_groups:
            group.open = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            for group in self.lora_groups:
                group.close()


class GatedMLP(nn.Module):
    """A mixin before the class of a gated MLP: its forward pass as one operation where that serves, else its own."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """As in :class:`Sharing`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class that the module had."""
        fused = self._fused_output(args[0]) if len(args) == 1 and not kwargs and backends.usable(args[0]) else None
        return super().forward(*args, **kwargs) if fused is None else fused

    def _fused_output(self, x: Tensor) -> Tensor | None:
        """All three projections in one operation; None if something about one of them keeps it from that."""
        layers: list[Any] = [self.gate_proj, self.up_proj, self.down_proj]
        # The kernel's sums over the intermediate features are not deterministic.
        if not serves(x) or not _is_silu(self.act_fn) or torch.are_deterministic_algorithms_enabled():
            return None
        weights: list[FrozenWeight] = []
        for layer in layers:
            weight = layer.frozen_weight(x) if _fits(layer) else None
            if weight is None:
                return None
            weights.append(weight)
        first = layers[0]
        dropout, has_scale = first.dropout_now(), first.has_output_scale
        if any([layer.dropout_now() != dropout or layer.has_output_scale != has_scale for layer in layers]):
            return None
        out_scales = [layer.output_scale() for layer in layers] if has_scale else ()
        A_list, B_list = zip(*[layer.update_factors() for layer in layers], strict=True)
        if max([A.shape[0] for A in A_list]) > backends.WIDEST_GATED:  # not the layer's rank: with a kept start the factors have twice that
            return None
        return lora_gated_mlp(x, weights, A_list, B_list, [layer.scaling for layer in layers], dropout, out_scales)


def _fused_class(base: type[nn.Module], *mixins: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base``, under its name: one for all its instances, so that compilers trace it once."""
    key = (base, *mixins)
    if key not in _CLASSES:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "fused_base": base}
        _CLASSES[key] = type(
            base.__name__, (*mixins, base), {**names, "fused_mixins": mixins, "__reduce_ex__": _reduce, "__setstate__": _restore}
        )
    return _CLASSES[key]


_CLASSES: dict[tuple[type[nn.Module], ...], type[nn.Module]] = {}


def _reduce(module: Any, protocol: Any) -> tuple[Any, ...]:
    cls = type(module)
    return _rebuild, (cls.fused_base, *cls.fused_mixins), module.__getstate__()


def _restore(module: Any, state: dict[str, Any]) -> None:
    super(type(module), module).__setstate__(state)
    for group in module.lora_groups:  # layers travel without: a copy of one would take the others along
        for layer in group.layers:
            layer.shared_input = group


def _rebuild(base: type[nn.Module], *mixins: type[nn.Module]) -> nn.Module:
    cls = _fused_class(base, *mixins)
    return cls.__new__(cls)


def _fits(layer: Any) -> bool:
    """Whether a projection is one that the kernels know, and nobody watches it."""
    return (
        isinstance(layer, LoRALinear)
        and layer.bias is None
        and "forward" not in layer.__dict__
        and layer.lora_A.requires_grad
        and not _watched(layer)
    )


def _is_gated_mlp(module: Any) -> bool:
    """Whether a module is a gated MLP with SiLU and three adapted projections."""
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    adapted = all(isinstance(layer, LoRALinear) for layer in layers) and "forward" not in module.__dict__
    return adapted and is_gated_mlp(type(module)) and _is_silu(getattr(module, "act_fn", None))


def _is_silu(function: Any) -> bool:
    """Whether it is SiLU and nobody watches it."""
    if isinstance(function, nn.Module):
        return type(function).__name__ in ("SiLU", "SiLUActivation") and not _watched(function)
    return function is nn.functional.silu


def _watched(module: nn.Module) -> bool:
    """Whether hooks want to see its calls."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
