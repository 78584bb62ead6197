"""Compute the start of adapters whose init reads data from batches of the training loader, before the strategy wraps the module.

The run then sees what it would have seen: random numbers, loaders, buffers, metrics, logged values and the module's own plain attributes
are as before. It is done once per module. A run that resumes, or starts from an adapter, has its values from there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lightning_lora.adapter_io.metadata import META, began_with, understood
from lightning_lora.callbacks.random_numbers import random_states, restore_random_states
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.awaiting import awaits_data, data_came
from lightning_lora.layers.base import lora_layers
from lightning_lora.model.apply import as_data_decided
from lightning_lora.model.data_start import initialize_from_data
from lightning_lora.model.modes import evaluating
from lightning_lora.model.targeting import find_targets
from lightning_lora.registry import data_of
from lightning_lora.strategies.checkpoint_io import found, read
from lightning_lora.strategies.lightning_private import prepared_batch, read_train_batches, will_resume
from lightning_lora.strategies.namespaces import twins
from lightning_lora.utils.messages import counted
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.sharding import is_sharded

_PLAIN = (bool, int, float, str, type(None))


def resumed_config(trainer: Trainer, config: LoRAConfig, root: str) -> LoRAConfig:
    """Return the config with the ranks that the checkpoint of this run has for a part, if they came from data or changed in its run.

    The latter is seen here only if the checkpoint is loaded after the model was sharded. Else the layers can still follow then.

    Args:
        trainer: of the run.
        config: the user's.
        root: name of the adapted part.
    """
    kind = data_of(config.init)
    by_data = kind is not None and kind.decides_ranks(config)
    if not (by_data or trainer.strategy.restore_checkpoint_after_setup) or (path := will_resume(trainer)) is None:
        return config
    meta = read(trainer.strategy.checkpoint_io, found(trainer.strategy.broadcast(path)), None).get(META)
    parts = {part.get("root", ""): part for part in (meta, *meta.get("others", ()))} if isinstance(meta, dict) else {}
    said = parts.get(root) if len(parts) > 1 else meta
    if said is None:
        return config  # what is wrong is said when it is loaded
    saved = understood(said, str(path))[0]
    if by_data:
        return as_data_decided(config, saved)
    changed = not began_with(said, saved).differences(config)
    return replace(config, rank_pattern=saved.rank_pattern, alpha_pattern=saved.alpha_pattern) if changed else config


def read_data(callback: Any, trainer: Trainer, module: LightningModule) -> None:
    """Let the init of a ``LoRACallback`` read data (:func:`start_from_data`). It may give the layers other ranks."""
    target = module.get_submodule(callback.module) if callback.module else module
    config = start_from_data(trainer, module, target, callback.init_batches)
    if config is not None:
        callback.config = callback.part.config = config
        callback.part.layers = [clean_name(name) for name, _ in lora_layers(target)]
        callback.report = find_targets(target, config)


def start_from_data(trainer: Trainer, module: LightningModule, target: nn.Module, number: int) -> LoRAConfig | None:
    """Compute the start of a part's adapters, if they wait for data and this run gives none.

    Args:
        trainer: before its strategy's ``setup``.
        module: the LightningModule.
        target: the adapted part of it.
        number: of batches to read, on each process.

    Returns:
        The config that the layers have now; None if nothing was done.

    Raises:
        ValueError: optimization is manual, or as :func:`~lightning_lora.initialize_from_data`.
    """
    waiting = [layer for _, layer in lora_layers(target) if awaits_data(layer)]
    resumes = bool(waiting) and will_resume(trainer) is not None
    if resumes:
        for layer in waiting:
            data_came(layer)
    if not waiting or resumes or trainer.state.fn != TrainerFn.FITTING or not trainer.limit_train_batches:
        return None
    init, began = waiting[0].lora_config.init, time.perf_counter()
    if not module.automatic_optimization:
        raise ValueError(
            f"init={init!r} runs training_step to read data, and {type(module).__name__} optimizes in it (automatic_optimization=False):"
            " call apply_lora and initialize_from_data(model, batches) before fit."
        )
    if data_of(init).decides_ranks(waiting[0].lora_config) and isinstance(trainer.strategy, twins(FSDPStrategy)):
        raise ValueError(
            f"init={init!r} gives layers other ranks, and strategy={type(trainer.strategy).__name__} has been told of their parameters: set"
            " init_options={'rho': 1.0}, or use strategy='lora_fsdp2'."
        )
    states = random_states(trainer)
    try:
        with as_before(trainer, module):
            batches = read_train_batches(trainer, number)
            initialize_from_data(target, batches, step=TrainingStep(trainer, module, batches))
    finally:
        restore_random_states(states, trainer)
    adapted = {name: layer for name, layer in lora_layers(target) if layer.low_rank}
    layers, config = {name: layer.rank for name, layer in adapted.items()}, next(iter(adapted.values())).lora_config
    lost = len(waiting) - len(layers)
    ranks = f"; ranks {min(layers.values())} to {max(layers.values())}" if len({*layers.values()}) > 1 or lost else ""
    none = f", none for {counted(lost, 'layer')}" if lost else ""
    seconds = time.perf_counter() - began
    rank_zero_info(
        f"init={init!r}: A and B of {counted(len(layers), 'layer')} from {counted(len(batches), 'batch')}, in {seconds:.1f} s{ranks}{none}."
    )
    return config


class TrainingStep:
    """Call ``training_step`` with a batch, as the Trainer does."""

    def __init__(self, trainer: Trainer, module: LightningModule, batches: list[Any]) -> None:
        self.trainer, self.indices = trainer, {id(batch): index for index, batch in enumerate(batches)}
        self.takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Return what ``training_step`` returns for one of the batches, which stays as it is."""
        index = [self.indices[id(batch)]] * self.takes_index
        return self.trainer.strategy.training_step(prepared_batch(self.trainer, deepcopy(batch)), *index)


@contextmanager
def as_before(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Put the module on the training device, in its dtype, without logging. Restore what a training step leaves behind."""
    home = next(module.parameters()).device
    with ExitStack() as undo:
        undo.enter_context(evaluating(module))
        undo.callback(_restoring(module))
        own: dict[str, Any] = {name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)}
        undo.callback(lambda: vars(module).update(own))
        for name in ("log", "log_dict"):
            undo.callback(vars(module).pop, name, None)
            vars(module)[name] = _nothing
        undo.callback(_reset_metrics, module)
        trainer.precision_plugin.convert_module(module)
        module.to(trainer.strategy.root_device)
        if isinstance(trainer.strategy, twins(FSDPStrategy, ModelParallelStrategy)) and not any(map(is_sharded, module.parameters())):
            undo.callback(module.to, home)  # sharding moves it, a block at a time
        yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of ``self.log``."""


def _restoring(module: LightningModule) -> Any:
    """Return a function that gives the module's plain attributes, its lists, dicts and sets, and its buffers their present content."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
    held = [(value, value.copy()) for name, value in vars(module).items() if type(value) in (list, dict, set) and not name.startswith("_")]
    places = [(child, name, b.detach().clone()) for child in module.modules() for name, b in child._buffers.items() if b is not None]

    def restore() -> None:
        vars(module).update(plain)
        for value, content in held:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
        with torch.no_grad():
            for child, name, content in places:  # by name: another device or dtype has new tensors
                buffer = child._buffers[name]
                child._buffers[name] = content if buffer is None else buffer.copy_(content)

    return restore


def _reset_metrics(module: LightningModule) -> None:
    """Reset torchmetrics' metrics, which have nothing to report yet."""
    for child in module.modules():
        if hasattr(child, "metric_state") and hasattr(child, "reset"):
            child.reset()  # type: ignore[operator]
