"""Give adapted layers other ranks, in place. The parameters stay the same objects, so that whoever holds them still does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf, nextafter

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.utils.patterns import by_name, exactly
from lightning_lora.utils.sharding import is_sharded


def check_resizable(layers: Mapping[str, LoRALayer], cure: str) -> None:
    """Raise ValueError if a layer is sharded: what averages its gradients knows its parameters' sizes.

    Args:
        layers: name → layer.
        cure: what to do about it, for the message.
    """
    for name, layer in layers.items():
        adapters = layer.lora_parameters().values()
        if any(map(is_sharded, adapters)) or is_sharded(layer.weight) or layer.weight.ndim < 2:  # FSDP1 leaves a flat weight
            raise ValueError(f"{name!r} is sharded, so it cannot get another rank: {cure}.")


def with_ranks(config: LoRAConfig, prefix: str, layers: Mapping[str, LoRALayer], ranks: Mapping[str, int]) -> LoRAConfig:
    """Return the config that gives these layers these ranks, with the scaling that each had."""
    kept = by_name({name: ranks[name] for name in layers if ranks[name]})
    return replace(
        config,
        rank_pattern=kept,
        alpha_pattern={name: _alpha(layers[name], rank) for name, rank in kept.items()},
        exclude_modules=[*_listed(config.exclude_modules), *(exactly(name, prefix) for name in layers if not ranks[name])],
    )


def _listed(patterns: Sequence[str] | str) -> list[str]:
    return [f"(?:{patterns})"] if isinstance(patterns, str) else list(patterns)  # a string is one regex


def _alpha(layer: LoRALayer, rank: int) -> float:
    """Return the alpha that keeps a layer's scaling at another rank, to the last bit if there is one."""
    if rank == layer.rank:
        return layer.alpha
    scaling_of = layer.lora_config.scaling_of
    near = layer.scaling / scaling_of(rank, 1)
    return next((a for a in (near, nextafter(near, 0), nextafter(near, inf)) if scaling_of(rank, a) == layer.scaling), near)


def spec_with(layer: LoRALayer, rank: int, config: LoRAConfig) -> LayerSpec:
    """Return a layer's spec with another rank and the same scaling."""
    return replace(layer.spec, config=config, rank=rank, alpha=_alpha(layer, rank))


def take_spec(layer: LoRALayer, spec: LayerSpec) -> None:
    """Give a layer, and each of its weights if it has several, a spec's config, rank and alpha. The parameters stay as they are."""
    for state in (layer.lora_state, *layer.lora_state.by_weight.values()):
        state.spec = replace(state.spec, config=spec.config, rank=spec.rank, alpha=spec.alpha)


def resize(layer: LoRALayer, spec: LayerSpec) -> None:
    """Give a layer the rank of another spec; its parameters keep no values."""
    for name, shape in layer.parameter_shapes(layer, spec).items():
        parameter = layer.get_parameter(name)
        if parameter.shape != shape:
            replace_values(parameter, parameter.detach().new_zeros(shape))
    take_spec(layer, spec)


def replace_values(parameter: nn.Parameter, values: Tensor, gradient: Tensor | None = None) -> None:
    """Give a parameter values and a gradient of another shape."""
    parameter.grad = None
    with torch.inference_mode(False):
        values = values.clone() if values.is_inference() else values  # which no backward pass could use
    # Graphs that are still held keep the node that takes the gradient, and that knows the old shape. Another dtype makes torch drop it.
    parameter.data = values.new_empty(0, dtype=torch.float64 if values.dtype != torch.float64 else torch.float32)
    parameter.data = values
    parameter.grad = gradient
