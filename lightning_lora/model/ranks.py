"""Give adapted layers other ranks, in place and before an optimizer knows their parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer
from lightning_lora.utils.parameters import make_parameter
from lightning_lora.utils.patterns import exactly
from lightning_lora.utils.sharding import is_sharded


def check_resizable(layers: Mapping[str, LoRALayer]) -> None:
    """Raise ValueError if a layer is sharded: what averages its gradients knows its parameters' sizes."""
    for name, layer in layers.items():
        if is_sharded(layer.lora_A) or is_sharded(layer.weight) or layer.weight.ndim < 2:  # FSDP1 leaves a flat weight
            raise ValueError(
                f"{name!r} is sharded, so it cannot get another rank: set init_options={{'rho': 1.0}}, or initialize before the model is"
                " sharded."
            )


def with_ranks(config: LoRAConfig, prefix: str, layers: Mapping[str, LoRALayer], ranks: Mapping[str, int]) -> LoRAConfig:
    """Return the config that gives these layers these ranks, with the scaling that each had."""
    names = sorted((name for name in layers if ranks[name]), key=lambda name: (-len(name), name))  # the first pattern that matches counts
    alphas = {name: _alpha(layers[name], ranks[name]) for name in names}
    return replace(
        config,
        rank_pattern={name: ranks[name] for name in names},
        alpha_pattern=alphas,
        exclude_modules=[*_listed(config.exclude_modules), *(exactly(name, prefix) for name in layers if not ranks[name])],
    )


def _listed(patterns: Sequence[str] | str) -> list[str]:
    return [f"(?:{patterns})"] if isinstance(patterns, str) else list(patterns)  # a string is one regex


def _alpha(layer: LoRALayer, rank: int) -> float:
    """Return the alpha that keeps a layer's scaling at another rank."""
    return layer.scaling / layer.lora_config.scaling_of(rank, 1)


def resize(layer: LoRALayer, rank: int, config: LoRAConfig) -> None:
    """Give a layer another rank; its parameters keep no values."""
    layer.lora_state.spec = replace(layer.spec, config=config, rank=rank, alpha=_alpha(layer, rank))
    for name, shape in layer.parameter_shapes(layer, layer.spec).items():
        before = layer._parameters[name]
        assert before is not None
        if before.shape != shape:
            layer._parameters[name] = make_parameter(before.new_zeros(shape), before.requires_grad)
