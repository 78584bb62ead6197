"""The hooks of a tensor-parallel plan, and linears that need them no longer.

A plan of torch's puts two hooks on each linear: one makes the input a DTensor, the other makes the output a plain tensor again. For a layer
that computes on its local shards (:mod:`lightning_lora.layers.tensor_parallel`) both are detours. And each of several linears that read one
tensor (q, k, v) would get a DTensor of its own, and sum its gradient over the ranks once more.

:func:`take_over` puts these hooks into others, which leave plain tensors to the layer. The layer calls the plan's hook on its input itself
where only operations on DTensors compute it. Once its adapter is removed, everything is as the plan left it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_lora.utils.sharding import is_sharded
from lightning_lora.utils.torch_private_parallel import plain_linear_hooks


class PlainInput:
    """Takes the place of a plan's hook that makes the input a DTensor. A layer with ``lora_split`` gets the input as it is."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, module: Any, inputs: tuple[Any, ...]) -> Any:
        """Return the DTensor; None, which leaves the inputs unchanged, for a layer with ``lora_split``."""
        return self.hook(module, inputs) if getattr(module, "lora_split", None) is None else None


class PlainOutput:
    """Takes the place of a plan's hook that makes a DTensor a plain output. An output that is plain already stays as it is."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        """Return the plain output."""
        return self.hook(module, inputs, output) if is_sharded(output) else output


def take_over(layer: Any) -> None:
    """Let a linear of a tensor-parallel plan take and return plain tensors.

    Do nothing if its class computes more than base and update, or if the plan's hooks do more than the two above: gathering the parts of a
    sequence, or leaving outputs DTensors.
    """
    if not layer.takes_plain:
        return
    before, after = layer._forward_pre_hooks, layer._forward_hooks
    hook = next((hook for hook in before.values() if isinstance(hook, PlainInput)), None)  # from an earlier adapter
    if hook is None:
        found = plain_linear_hooks(before, after)
        if found is None:
            return
        enters, leaves = found
        hook = before[enters] = PlainInput(before[enters])
        after[leaves] = PlainOutput(after[leaves])
    layer.lora_split = hook


def watches_input(layer: Any) -> bool:
    """True if a layer has hooks on its input, other than :class:`PlainInput`, or on its gradients."""
    if layer._backward_hooks or layer._backward_pre_hooks:
        return True
    return bool(layer._forward_pre_hooks) and any([not isinstance(hook, PlainInput) for hook in layer._forward_pre_hooks.values()])


def watches_output(layer: Any) -> bool:
    """True if a layer has hooks on its output, other than :class:`PlainOutput`."""
    return bool(layer._forward_hooks) and any([not isinstance(hook, PlainOutput) for hook in layer._forward_hooks.values()])
