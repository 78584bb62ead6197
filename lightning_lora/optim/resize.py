"""``resize_ranks``: other ranks for the adapters of a model that is in training. Nothing else of the run changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.adapting import shallow_copy
from lightning_lora.layers.awaiting import awaits_data
from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.layers.directions import Directions
from lightning_lora.layers.factors import Factors
from lightning_lora.layers.filling import fill_random
from lightning_lora.layers.slices import Sliced
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.model.ranks import check_resizable, replace_values, spec_with, take_spec, with_ranks
from lightning_lora.ops.other_rank import best_directions
from lightning_lora.optim.carried import FactorChange, check_carried, check_optimizer
from lightning_lora.optim.groups import unwrapped
from lightning_lora.registry import belongs_to_packed_base, data_of, frozen_factor, init_of
from lightning_lora.utils.names import adapter_root, clean_name, join
from lightning_lora.utils.parameters import make_parameter
from lightning_lora.utils.patterns import compile_pattern, no_match
from lightning_lora.utils.sharding import broadcast, is_distributed
from lightning_lora.utils.values import nonfinite

_CURE = "give the config rank_pattern before the model is sharded, or train under one process or DDP"


def resize_ranks(model: nn.Module, ranks: Mapping[str, int], optimizers: Optimizer | Sequence[Optimizer]) -> dict[str, tuple[int, int]]:
    """Give adapted layers other ranks in the middle of a training, in place. Call it between optimizer steps.

    A lower rank keeps the best approximation of ΔW, by the singular value decomposition of B·A, which is never built. A higher rank adds
    directions whose B is zero and whose A the init fills: ΔW stays as it is. The scaling stays too. Parameters remain the same objects, so
    parameter groups, schedulers, LoRA+ and preconditioners work on. Optimizer state and gradients follow
    (:mod:`lightning_lora.optim.carried`). In a model under ``DistributedDataParallel`` wrap the module anew afterwards; every process
    calls this function, and all get the first one's numbers.

    Args:
        model: adapted, not merged, not sharded.
        ranks: pattern → rank, as ``LoRAConfig.rank_pattern``; the first pattern that matches a layer applies. Others keep their rank.
        optimizers: all that hold the adapters; ``()`` before there is one.

    Returns:
        Name → rank before and after, of the layers whose rank changed.

    Raises:
        ValueError: a pattern matches no layer. Or a layer cannot have that rank: it is merged, sharded, on the meta device or not finite;
            its variant or init computes the update with more than A and B (VeRA, LoRA-XS, AdaLoRA, PiSSA, OLoRA), or freezes a factor
            that it computed (MiCA). Or an optimizer keeps a state that cannot follow. Nothing is changed then.

    Examples:
        >>> model = apply_lora(model, LoRAConfig(rank=8))
        >>> optimizer = torch.optim.AdamW(get_lora_parameters(model), lr=1e-3)
        >>> resize_ranks(model, {"layers.0.self_attn.q_proj": 4}, optimizer)
        {'model.layers.0.self_attn.q_proj': (8, 4)}
    """
    given = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
    return plan_resize(model, ranks, [unwrapped(optimizer) for optimizer in given]).carry_out()


@dataclass(frozen=True)
class Resizing:
    """New ranks that are computed, and not yet in the model.

    Attributes:
        config: of the layers afterwards; None if no rank changes.
        ranks: name in the model → rank before and after, of the layers whose rank changes.
    """

    config: LoRAConfig | None
    ranks: dict[str, tuple[int, int]]
    _values: list[tuple[nn.Parameter, Tensor, Tensor | None]]
    _states: list[tuple[Optimizer, nn.Parameter, dict[str, object]]]
    _specs: list[tuple[LoRALayer, LayerSpec]]

    def carry_out(self) -> dict[str, tuple[int, int]]:
        """Change the model and the optimizers. Return :attr:`ranks`."""
        for optimizer, parameter, slots in self._states:
            optimizer.state[parameter] = slots
        for parameter, values, gradient in self._values:
            replace_values(parameter, values, gradient)
        for layer, spec in self._specs:
            take_spec(layer, spec)
        return self.ranks


@torch.no_grad()
def plan_resize(model: nn.Module, ranks: Mapping[str, int], optimizers: Sequence[Optimizer]) -> Resizing:
    """Compute what :func:`resize_ranks` does. Change nothing.

    Raises:
        ValueError: as there.
    """
    prefix, root = adapter_root(model)
    everyone = {clean_name(name): layer for name, layer in lora_layers(root)}
    layers = {name: layer for name, layer in everyone.items() if layer.low_rank}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapters with a rank; call apply_lora(model, config=...) first.")
    config = next(iter(layers.values())).lora_config
    wanted = _wanted(layers, prefix, ranks, config)
    changing = {name: layer for name, layer in layers.items() if wanted[name] != layer.rank}
    if not changing:
        return Resizing(None, {}, [], [], [])
    config = with_ranks(config, prefix, layers, wanted)
    check_layers({name: layers[name] for name in changing})
    specs = {name: spec_with(layer, wanted[name], config) for name, layer in layers.items()}
    for name, layer in changing.items():
        try:
            type(layer).check(layer, specs[name])
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}.") from error
    factors = {f"{name}.{short}": p for name, layer in changing.items() for short, p in layer.lora_parameters().items()}
    if spoilt := nonfinite(factors):
        raise ValueError(f"{spoilt[0]} holds NaN or infinity, so it has no best directions: load a sound checkpoint first.")
    for optimizer in optimizers:
        check_carried(optimizer, factors)
    changes = [change for name, layer in changing.items() for part in layer.by_weight().values() for change in _changes(part, specs[name])]
    states = [
        (optimizer, change.parameter, change.new_state(optimizer.state[change.parameter], group))
        for optimizer in optimizers
        for group in optimizer.param_groups
        for change in changes
        if any(change.parameter is p for p in group["params"]) and optimizer.state.get(change.parameter)
    ]
    others = [(layer, replace(layer.spec, config=config)) for name, layer in everyone.items() if name not in layers]
    return Resizing(
        config,
        {join(prefix, name): (layer.rank, wanted[name]) for name, layer in changing.items()},
        [(change.parameter, change.new_values(), change.new_gradient()) for change in changes],
        states,
        [*((layer, specs[name]) for name, layer in layers.items()), *others],
    )


def check_layers(layers: Mapping[str, LoRALayer]) -> None:
    """Raise ValueError if a layer cannot get another rank while it trains, whatever the rank. The message names the layer."""
    for name, layer in layers.items():
        config = layer.lora_config
        for part in layer.by_weight().values():
            owner = next(cls for cls in type(part).__mro__ if "update_factors" in vars(cls) and cls is not Sliced)
            if owner is not Factors:
                what = f"variant={config.variant!r} does not compute its update from A and B alone"
            elif "lora_A0" in part._parameters:
                what = f"init={config.init!r} keeps its start, which belongs to its rank"
            elif frozen_factor(config.init):
                what = f"init={config.init!r} freezes a factor that it computed from the weight"
            elif awaits_data(layer):
                what = f"init={config.init!r} has seen no data yet"
            elif layer.merged:
                what = "it is merged; call unmerge_lora(model) first"
            elif part.lora_A.is_meta:
                what = "it is on the meta device; load its weights first"
            else:
                check_resizable({name: part}, _CURE)
                continue
            raise ValueError(f"{name!r} cannot get another rank: {what}.")


def check_resizing(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Check before a training that its ranks can change later: every layer, and the optimizers as far as can be seen without a state.

    Raises:
        ValueError: a layer or an optimizer does not allow it.
    """
    check_layers({clean_name(name): layer for name, layer in lora_layers(model) if layer.low_rank})
    for optimizer in optimizers:
        check_optimizer(optimizer)


def _wanted(layers: Mapping[str, LoRALayer], prefix: str, ranks: Mapping[str, int], config: LoRAConfig) -> dict[str, int]:
    """Return each layer's rank."""
    replace(config, rank_pattern=dict(ranks))  # checks patterns and ranks
    patterns = [(compile_pattern(text, "ranks"), rank) for text, rank in ranks.items()]
    full = {name: join(prefix, name) for name in layers}
    for pattern, _ in patterns:
        if not any(pattern.matches(each) for pair in full.items() for each in pair):
            raise ValueError(no_match("ranks", pattern.text, layers).partition(" (allow_unmatched")[0])
    return {
        name: next((rank for pattern, rank in patterns if pattern.matches(name) or pattern.matches(full[name])), layer.rank)
        for name, layer in layers.items()
    }


def _changes(part: LoRALayer, spec: LayerSpec) -> list[FactorChange]:
    """Return how A and B of one weight change."""
    shapes = part.parameter_shapes(part, spec := replace(part.spec, config=spec.config, rank=spec.rank, alpha=spec.alpha))
    before, after = Directions.of(part), shapes["lora_B"][1]
    rank, at_random = part.lora_B.shape[1], part.lora_factors()[0] is part.lora_A
    A, B = ([block.cpu().double() for block in blocks] for blocks in (before.of_A(part.lora_A), before.of_B(part.lora_B)))
    if after >= rank:
        eye = [torch.eye(rank, dtype=torch.float64).expand(len(block), -1, -1) for block in A]
        T, S = eye, eye
    elif at_random:
        maps = [best_directions(a, b.mT, after) for a, b in zip(A, B, strict=True)]
        T, S = [t for t, _ in maps], [s for _, s in maps]
    else:
        maps = [best_directions(b, a.mT, after) for a, b in zip(A, B, strict=True)]
        T, S = [s.mT for _, s in maps], [t.mT for t, _ in maps]
    fresh = _fresh(part, spec, shapes, at_random)
    kept = T[0].shape[1]
    new = {name: [block[:, kept:].cpu().double() for block in blocks] for name, blocks in fresh.items()}
    if is_distributed():  # others may decompose to other signs, or draw other numbers
        T, S, new["lora_A"], new["lora_B"] = ([block.contiguous() for block in blocks] for blocks in (T, S, new["lora_A"], new["lora_B"]))
        broadcast([*T, *S, *new["lora_A"], *new["lora_B"]], [torch.distributed.group.WORLD])
    of_A = FactorChange(part.lora_A, shapes["lora_A"], before.of_A, before.to_A, T, S := [s.mT for s in S], new["lora_A"])
    return [of_A, FactorChange(part.lora_B, shapes["lora_B"], before.of_B, before.to_B, S, T, new["lora_B"])]


def _fresh(part: LoRALayer, spec: LayerSpec, shapes: Mapping[str, tuple[int, ...]], at_random: bool) -> dict[str, list[Tensor]]:
    """Return the directions of an adapter of the new rank that adds nothing, as the layer's init starts it."""
    copy = shallow_copy(part)
    copy.lora_state.spec = spec
    for name in ("lora_A", "lora_B"):
        copy._parameters[name] = make_parameter(torch.empty(shapes[name], device=part.lora_A.device, dtype=part.lora_A.dtype), True)
    init = spec.config.init
    # An init of data, or of what quantizing lost, has only the directions that it began with.
    (fill_random if data_of(init) is not None or belongs_to_packed_base(init) else init_of(init))(copy)
    (copy.lora_B if at_random else copy.lora_A).zero_()
    divided = Directions.of(copy)
    return {"lora_A": divided.of_A(copy.lora_A), "lora_B": divided.of_B(copy.lora_B)}
