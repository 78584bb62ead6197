"""Ranks that change in a run: what ``LoRACallback`` and its checkpoints know of them.

A checkpoint holds the ranks that the layers have when it is saved, and those that the run began with. A run with the config that it began
with resumes it, tests it, and loads one from before the change too: the layers take the ranks of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_lora.callbacks.data_start import resumed_config
from lightning_lora.callbacks.starting import part_root
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.model.merge import unmerge_layers
from lightning_lora.model.ranks import check_resizable, replace_values, resize, take_spec
from lightning_lora.model.targeting import find_targets
from lightning_lora.optim.resize import Resizing, plan_resize
from lightning_lora.strategies.adapted_part import AdaptedPart
from lightning_lora.strategies.rewrap import rewrap
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.patterns import exactly


def config_to_adapt(callback: Any, trainer: Trainer, target: nn.Module) -> LoRAConfig:
    """Return the config that a ``LoRACallback`` adapts its part with.

    It is the user's, or that of an adapter it starts from, with the ranks of the checkpoint that the run resumes.

    Args:
        callback: knows the user's config, and whether ranks have changed since.
        trainer: of the run.
        target: the part.
    """
    if callback.began is not None and next(lora_layers(target), None) is None:  # another module, which begins anew
        callback.config, callback.began = callback.began, None
    if callback._start is not None:
        callback.config = callback._start.config(target, callback.config)
    return resumed_config(trainer, callback.config, part_root(callback, target))


def follow_checkpoints(callback: Any, part: AdaptedPart, target: nn.Module) -> AdaptedPart:
    """Let a part take the ranks of checkpoints that are loaded. Return it."""
    part.began, part.take_ranks = callback.began, partial(_take_ranks, callback, part, target)
    return part


def apply_ranks(
    trainer: Trainer, module: LightningModule, callbacks: Sequence[Any], ranks: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Give the layers of a running fit other ranks, between two batches. Every process calls it.

    Args:
        trainer: of the run.
        module: the LightningModule.
        callbacks: the ``LoRACallback`` objects.
        ranks: layer's name in the module → rank.

    Returns:
        Name → rank before and after, of the layers whose rank changed.

    Raises:
        ValueError: as :func:`~lightning_lora.resize_ranks`; nothing is changed then.
    """
    plans: list[tuple[Any, nn.Module, Resizing]] = []
    for callback in callbacks:
        target, prefix = module.get_submodule(callback.module or ""), f"{callback.module}." if callback.module else ""
        names = [clean_name(prefix + name) for name, _ in lora_layers(target)]
        mine = {exactly(name.removeprefix(prefix)): ranks[name] for name in names if name in ranks}
        if mine:
            plans.append((callback, target, plan_resize(target, mine, trainer.strategy.optimizers)))
    changed: dict[str, tuple[int, int]] = {}
    for callback, target, plan in plans:
        found = plan.carry_out()
        changed |= {f"{callback.module}.{name}" if callback.module else name: each for name, each in found.items()}
        if plan.config is not None:
            _know(callback, callback.part, target, plan.config, callback.began or callback.config)
    if changed:
        rewrap(trainer.strategy)
    return changed


def _know(callback: Any, part: AdaptedPart, target: nn.Module, config: LoRAConfig, began: LoRAConfig | None) -> None:
    callback.config = part.config = config
    callback.began = part.began = None if began is not None and not began.differences(config) else began
    callback.report = find_targets(target, config)


def _take_ranks(callback: Any, part: AdaptedPart, target: nn.Module, config: LoRAConfig) -> None:
    """Give the layers the ranks of a checkpoint's config. Their values come with it. If the run is refused, all is as before."""
    unmerge_layers(target)
    targets = [(each.module, each.spec) for each in find_targets(target, config).targets]
    layers: dict[str, LoRALayer] = {spec.fqn: weight for layer, spec in targets for weight in layer.by_weight().values()}  # type: ignore[operator]
    check_resizable(layers, "give LoRAConfig the rank_pattern and alpha_pattern of the checkpoint")
    before = [(layer, layer.spec, [(p, p.data) for p in layer.lora_parameters().values()]) for _, layer in lora_layers(target)]
    known = callback.config, callback.began, callback.report

    def restore() -> None:
        for layer, spec, values in before:
            for parameter, value in values:
                replace_values(parameter, value)
            take_spec(layer, spec)
        (callback.config, callback.began, callback.report), (part.config, part.began) = known, known[:2]

    callback._undo.callback(restore)
    for layer, spec in targets:
        resize(layer, spec)  # type: ignore[arg-type]
    _know(callback, part, target, config, part.began or part.config)
