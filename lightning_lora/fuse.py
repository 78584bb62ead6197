"""Recognise the parts of a block whose adapted linears can share work. On by default; :func:`unfuse` undoes it.

Linears that read the same input (q, k, v) share the pass over it. On a GPU a gated MLP is computed as one operation.

Parameters stay in their layers and state dicts are unchanged. Whatever does not fit (another variant, a quantized or sharded base, merged
layers, inputs that differ after all) is computed layer by layer, as if this had not been called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import kernels
from lightning_lora.gated_ops import lora_gated_mlp
from lightning_lora.layers import LoRALinear
from lightning_lora.layers.siblings import Siblings

#: Names under which models keep projections of one input, side by side in one parent.
TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


def fuse(model: nn.Module) -> list[Siblings]:
    """Let adapted linears that read the same input share it.

    Args:
        model: a model with adapters; its forward passes are not changed, its layers' are.

    Returns:
        The groups there are now.
    """
    groups = []
    for name, parent in model.named_modules():
        if _is_gated_mlp(parent):
            parent.__class__ = _gated_class(type(parent))
        for family in TOGETHER:
            children = [(f"{name}.{child}", getattr(parent, child, None)) for child in family]
            found = [(fqn, layer) for fqn, layer in children if isinstance(layer, LoRALinear)]
            if len(found) > 1:
                group = Siblings([fqn for fqn, _ in found], [layer for _, layer in found])
                groups.append(group)
                for layer in group.layers:
                    layer.lora_siblings = group
    return groups


def unfuse(model: nn.Module) -> None:
    """Compute every adapted linear by itself again."""
    for module in model.modules():
        if isinstance(module, GatedMLP):
            module.__class__ = type(module).gated_base  # type: ignore[assignment]
        if isinstance(module, LoRALinear):
            module.lora_siblings = None


class GatedMLP(nn.Module):
    """A mixin before the class of a gated MLP: its forward pass as one operation where that serves, else its own."""

    gated_base: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the class that the module had."""
        layers: list[Any] = [self.gate_proj, self.up_proj, self.down_proj]
        if len(args) != 1 or kwargs or not kernels.usable(args[0]):
            return super().forward(*args, **kwargs)
        if not all([_serves(layer, args[0]) for layer in layers]) or len({layer.dropout_now() for layer in layers}) > 1:
            return super().forward(*args, **kwargs)
        As, Bs = zip(*[layer.update_factors() for layer in layers], strict=True)
        return lora_gated_mlp(
            args[0],
            [layer.weight for layer in layers],
            As,
            Bs,
            [layer.scaling for layer in layers],
            layers[0].dropout_now(),
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (type(self).gated_base,), self.__dict__


def _gated_class(base: type[nn.Module]) -> type[GatedMLP]:
    """The subclass of ``base``, under its name: one for all its instances, so that compilers trace it once."""
    if base not in _CLASSES:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "gated_base": base}
        _CLASSES[base] = type(base.__name__, (GatedMLP, base), names)
    return _CLASSES[base]


_CLASSES: dict[type[nn.Module], type[GatedMLP]] = {}


def _rebuild(base: type[nn.Module]) -> GatedMLP:
    cls = _gated_class(base)
    return cls.__new__(cls)


def _serves(layer: Any, x: Tensor) -> bool:
    return (
        isinstance(layer, LoRALinear)
        and layer.fusable(x)
        and layer.bias is None
        and layer.rank <= kernels.WIDEST_GATED
        and layer.lora_A.requires_grad
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and not torch.are_deterministic_algorithms_enabled()  # the kernel's sums over the intermediate features are not
    )


def _is_gated_mlp(module: Any) -> bool:
    """Whether a module's forward is, instruction by instruction, one of those below, with SiLU and three adapted projections."""
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(layer, LoRALinear) for layer in layers) or "forward" in module.__dict__:
        return False
    if len({layer.lora_config.dropout for layer in layers if isinstance(layer, LoRALinear)}) > 1:
        return False
    silu = (
        type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
        or getattr(module, "act_fn", None) is nn.functional.silu
    )
    code = getattr(type(module).forward, "__code__", None)
    return silu and code is not None and any(_instructions(code) == _instructions(form.__code__) for form in _FORMS)


def _instructions(code: Any) -> tuple[Any, ...]:
    return code.co_code, code.co_names, code.co_argcount


def _expression(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _statement(self: Any, x: Tensor) -> Tensor:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


_FORMS = (_expression, _statement)
