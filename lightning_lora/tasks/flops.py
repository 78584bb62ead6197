"""The model FLOPs of a batch, as LoRA spends them.

A weight matrix of P elements costs 2·P FLOPs per position in the forward pass. Its backward pass costs 2·P for the gradient of its input,
if something before it trains, and 2·P for its own gradient, if it trains itself. So per token a frozen matrix behind the first adapter
costs 4·P, a frozen one before it 2·P, an adapter's p elements 6·p, and full training 6·P (Kaplan et al., arXiv:2001.08361, section 2.1).

Only matrices count: no attention scores, norms or activations. Padding counts, because it is computed. What gradient checkpointing
computes again does not. Of experts in one tensor those that a token is routed to count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from lightning_lora.layers.base import PREFIX


class FlopsPerPosition:
    """FLOPs per position of each module of a model.

    Args:
        model: Its modules are taken in their order, and what trains as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        self.forward: dict[nn.Module, float] = {}
        self.step: dict[nn.Module, float] = {}
        self.parts: dict[nn.Module, tuple[float, float]] = {}
        share, before = _active_experts(getattr(model, "config", None)), False
        for module in model.modules():
            forward = step = 0.0
            for matrix, adapter, elements in _matrices(module, share):
                forward += 2 * elements
                # The first adapter's A has an input without gradient: too little to tell apart.
                step += 2 * elements * (1 + (before or adapter) + matrix.requires_grad)
            before = before or any(p is not None and p.requires_grad for p in module._parameters.values())
            self.forward[module], self.step[module] = forward, step

    def total(self, parts: Iterable[tuple[nn.Module, int]], training: bool) -> float:
        """Return the FLOPs of a batch.

        Args:
            parts: Modules, each with everything inside, and how many positions each computes. They do not overlap.
            training: Count the backward pass too.
        """
        flops = 0.0
        for part, positions in parts:
            if part not in self.parts:
                inside = [module for module in part.modules() if module in self.forward]
                self.parts[part] = sum(self.forward[module] for module in inside), sum(self.step[module] for module in inside)
            forward, step = self.parts[part]
            flops += positions * (step if training else forward)
        return flops


def measured_positions(model: nn.Module, run: Callable[[], Any]) -> dict[nn.Module, int]:
    """Return how many positions each linear and convolution computes, in a run that is made for it.

    In a language model every layer computes every token. An image model may merge positions from layer to layer.
    """
    found: dict[nn.Module, int] = {}

    def note(module: Any, args: Any, output: Any) -> None:
        found[module] = found.get(module, 0) + output.numel() // (getattr(module, "out_features", None) or module.out_channels)

    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _matrices(module: nn.Module, share: float) -> Iterator[tuple[nn.Parameter, bool, float]]:
    """Yield a module's own matrices, whether it is an adapter's, and how many elements of it multiply one position."""
    if isinstance(module, nn.Embedding):
        return  # it looks rows up
    experts = any(p is not None and p.dim() == 3 and p.shape[0] > 1 for p in module._parameters.values())
    for name, parameter in module._parameters.items():
        if parameter is None or parameter.dim() < 2 or parameter.shape[0] == 1:  # biases; tokens and positions of image models
            continue
        elements = float(parameter.numel())
        if name == "weight" and isinstance(module, nn.Linear):  # a 4-bit weight has half as many
            elements = module.in_features * module.out_features
        yield parameter, name.startswith(PREFIX), elements * (share if experts and not isinstance(module, nn.Conv1d) else 1.0)


def _active_experts(config: Any) -> float:
    """Return the share of the experts that a token is routed to; 1 for models without experts."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    active = getattr(text, "num_experts_per_tok", None)
    experts = [getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    return next((active / total for total in experts if active and total), 1.0)
