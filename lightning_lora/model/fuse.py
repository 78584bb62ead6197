"""Find adapted linears of a block that can share work. On by default; :func:`unfuse` undoes it.

Linears with a shared input (q, k, v) read it in one pass. On a GPU a gated MLP runs as one fused operation.

Parameters stay in their layers, and state dicts do not change. Whatever does not fit is computed layer by layer, as if unfused: DoRA with
dropout, a sharded base, a quantized base of a format without fused products, merged layers, inputs that differ after all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers import LoRALinear
from lightning_lora.layers.classes import strip_class
from lightning_lora.layers.plan_hooks import watches_input, watches_output
from lightning_lora.layers.shared_input import SharedInputGroup
from lightning_lora.layers.tensor_parallel import enter, is_by_columns, leave
from lightning_lora.ops import backends
from lightning_lora.ops.fused_linear import one_operation_takes
from lightning_lora.ops.gated_mlp import lora_gated_mlp
from lightning_lora.utils.forward_source import calls_together, is_gated_mlp


def fuse(model: nn.Module) -> list[SharedInputGroup]:
    """Fuse adapted linears that read the same input, and gated MLPs.

    Args:
        model: a model with adapters. Classes of modules in it change; its outputs do not.

    Returns:
        The groups of linears with a shared input.
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
    """Compute every adapted linear separately again, until LoRA is applied again.

    Args:
        model: an adapted model; one without fused layers does not change.

    Examples:
        >>> model = apply_lora(model, LoRAConfig(target_modules="all-linear"))
        >>> unfuse(model)  # such as to compare with the separate products
    """
    for module in model.modules():
        if isinstance(module, LoRALinear) and module.shared_input is not None:
            module.shared_input.dissolve()
        if isinstance(module, (Sharing, GatedMLP)):
            del module.__dict__["lora_groups"]
            module.__class__ = strip_class(type(module), "fused_base")


class Sharing(nn.Module):
    """Mixin before the class of a module whose linears have a shared input: its groups are open while its forward runs."""

    lora_groups: list[SharedInputGroup]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Skip the base's ``__init_subclass__``, which may require arguments: the fused class is not a subclass that the user defined."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original class's forward with the groups open."""
        for group in self.lora_groups:
            group.open = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            for group in self.lora_groups:
                group.close()


class GatedMLP(nn.Module):
    """Mixin before the class of a gated MLP: runs the fused operation if every precondition holds, else the original forward."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Skip the base's ``__init_subclass__``, as in :class:`Sharing`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the fused operation if it applies, else the original class's forward."""
        fused = self._fused_output(args[0]) if len(args) == 1 and not kwargs and backends.worth_kernels(args[0]) else None
        return super().forward(*args, **kwargs) if fused is None else fused

    def _fused_output(self, x: Tensor) -> Tensor | None:
        """Return the output of the fused operation over all three projections; None if a precondition does not hold."""
        layers: list[Any] = [self.gate_proj, self.up_proj, self.down_proj]
        # The kernel's sums over the intermediate features are not deterministic.
        if not one_operation_takes(x) or not _is_silu(self.act_fn) or torch.are_deterministic_algorithms_enabled():
            return None
        if not all([_fits(layer) for layer in layers]):
            return None
        first = layers[0]
        dropout, has_scale = first.dropout_now(), first.has_output_scale
        if any([layer.dropout_now() != dropout or layer.has_output_scale != has_scale for layer in layers]):
            return None
        split = first.lora_split is not None
        operands = _local_operands(layers, x) if split else _operands(layers, x)
        if operands is None:
            return None
        x, weights, A_list, B_list = operands
        out_scales = [layer.output_scale() for layer in layers] if has_scale else ()
        y = lora_gated_mlp(x, weights, A_list, B_list, [layer.scaling for layer in layers], dropout, out_scales)
        return leave(y, first.weight.device_mesh) if split else y


def _operands(layers: list[Any], x: Tensor) -> tuple[Tensor, list[Any], list[Tensor], list[Tensor]] | None:
    """Return x, and the layers' frozen weights and factors; None if a layer's weight cannot be part of one operation for x."""
    weights = [layer.frozen_weight(x) for layer in layers]
    if any([weight is None for weight in weights]):
        return None
    factors = [layer.update_factors() for layer in layers]
    return x, weights, [A for A, _ in factors], [B for _, B in factors]


def _local_operands(layers: list[Any], x: Tensor) -> tuple[Tensor, list[Any], list[Tensor], list[Tensor]] | None:
    """Return the same on this rank's shards; the output is then a partial sum. Gate and up are column-parallel, down is row-parallel."""
    if any([layer.lora_split is None for layer in layers]) or [is_by_columns(layer) for layer in layers] != [True, True, False]:
        return None
    operands = enter(layers, x, sum_x=True)
    return None if operands is None else (operands.x, operands.weights, operands.A_list, operands.B_list)


def _fused_class(base: type[nn.Module], *mixins: type[nn.Module]) -> type[nn.Module]:
    """Return the fused subclass of ``base``, with its name. All instances share one subclass, so that compilers trace it once."""
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
    for group in module.lora_groups:  # a layer's state has no group: otherwise a copy of one layer would copy the others
        for layer in group.layers:
            layer.shared_input = group


def _rebuild(base: type[nn.Module], *mixins: type[nn.Module]) -> nn.Module:
    cls = _fused_class(base, *mixins)
    return cls.__new__(cls)


def _fits(layer: Any) -> bool:
    """True if the kernels support this projection, and no hooks are on it."""
    return (
        isinstance(layer, LoRALinear)
        and layer.bias is None
        and "forward" not in layer.__dict__
        and layer.lora_A.requires_grad
        and not _watched(layer)
    )


def _is_gated_mlp(module: Any) -> bool:
    """True if a module is a gated MLP with SiLU and three adapted projections."""
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    adapted = all(isinstance(layer, LoRALinear) for layer in layers) and "forward" not in module.__dict__
    return adapted and is_gated_mlp(type(module)) and _is_silu(getattr(module, "act_fn", None))


def _is_silu(function: Any) -> bool:
    """True if it is SiLU, and no hooks are on it."""
    if isinstance(function, nn.Module):
        return type(function).__name__ in ("SiLU", "SiLUActivation") and not _watched(function)
    return function is nn.functional.silu


def _watched(module: nn.Module) -> bool:
    """True if the module has forward or backward hooks, which a fused operation would skip."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) and (watches_input(module) or watches_output(module))
