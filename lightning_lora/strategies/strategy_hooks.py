"""What a Lightning strategy has to do differently under LoRA.

Lightning routes everything that matters here through the strategy: making optimizers, the state dict of a checkpoint,
loading one, optimizer state. A callback's own hooks come too late or not at all (``on_save_checkpoint`` is skipped for
``save_weights_only``, ``on_load_checkpoint`` runs after the weights are in). So :class:`StrategyHooks` puts itself
before those methods on the trainer's strategy *instance*; classes and the user's module stay untouched.

What they do is the same under every strategy, because it is said of single parameters: take a parameter whole, cut the
piece of it that this rank has, name it. Nothing here asks a strategy for a state dict of the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_lora.adapter_io import fingerprint
from lightning_lora.adapter_io.files import META, AdapterFile
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import kept_parameters
from lightning_lora.model import parallel
from lightning_lora.model.merge import unmerge_lora
from lightning_lora.optim.groups import only_trainable
from lightning_lora.optim.lora_plus import apply_lora_plus, check_kept, holds_b
from lightning_lora.optim.state import load_by_name, state_by_name
from lightning_lora.strategies.checkpoint_io import REST, DurableCheckpointIO, read_folder, write_folder
from lightning_lora.strategies.lightning_private import saves_shards
from lightning_lora.utils.checksums import checksum
from lightning_lora.utils.names import clean_name, persistent_buffers
from lightning_lora.utils.sharding import (
    broadcast,
    full_tensor,
    is_distributed,
    is_sharded,
    local_shard,
    local_tensor,
    on_first_rank,
    reshard,
)

#: The strategy's methods that the hooks stand in place of.
REPLACED = (
    "lightning_module_state_dict",
    "save_checkpoint",
    "load_checkpoint",
    "load_model_state_dict",
    "optimizer_state",
    "load_optimizer_state_dict",
)
_HOOKED = ("setup_optimizers", *REPLACED)  # the first calls the strategy's own


class StrategyHooks:
    """Adapter-only checkpoints, exact resume and frozen-free optimizers for one module under one strategy.

    Args:
        strategy: the trainer's.
        module: the adapted LightningModule.
        root: name of the child that adapter files are relative to ("" for the module itself).
        config: what it was adapted with.
        check_base: refuse checkpoints that were trained on another base.
        lora_plus_ratio: how many times A's learning rate B gets.
    """

    def __init__(
        self, strategy: Strategy, module: LightningModule, root: str, config: LoRAConfig, check_base: bool, lora_plus_ratio: float = 1.0
    ) -> None:
        self.lora_plus_ratio = lora_plus_ratio
        self.strategy, self.module, self.root, self.config, self.check_base = strategy, module, root, config, check_base
        # Persistent buffers as they are before any training or restoring: those that differ later belong into checkpoints.
        self.buffers = {name: buffer_digest(buffer) for name, buffer in persistent_buffers(module).items()}
        self.originals: dict[str, Callable[..., Any]] = {}
        #: Called with the config of a checkpoint before it is held against the module, which it may change to fit.
        self.before_load: Callable[[LoRAConfig], None] | None = None
        self._base: dict[str, Any] | None = None
        # FSDP1 flattens the weights: read before it wraps, or not at all.
        self._flattened = any(isinstance(child, FullyShardedDataParallel) for child in module.modules())
        if not self._flattened and not any(p.is_meta or is_sharded(p) for p in module.parameters()):
            self._base = self._base_identity()

    def install(self) -> None:
        """Put the hooks before the strategy's own methods; hooks of an earlier run on the same strategy are replaced."""
        earlier = getattr(self.strategy, "_lora_hooks", None)
        if earlier is not None:
            if earlier.module is self.module:
                # The first run's start is what "changed" means, and what the base is.
                self.buffers, self._base = earlier.buffers, earlier._base
            earlier.remove()
        for name in _HOOKED:
            self.originals[name] = getattr(self.strategy, name)
            setattr(self.strategy, name, getattr(self, name))
        self.strategy._lora_hooks = self  # type: ignore[attr-defined]
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = DurableCheckpointIO()

    def remove(self) -> None:
        """Give the strategy its own methods back."""
        for name in self.originals:
            delattr(self.strategy, name)

    # Each of these stands before the strategy's method of the same name.

    def setup_optimizers(self, trainer: Trainer) -> None:
        """``configure_optimizers``, on adapters that are the same on every rank, without frozen parameters; then LoRA+."""
        synchronize(self.module)
        with only_trainable():
            self.originals["setup_optimizers"](trainer)
        schedulers = [config.scheduler for config in self.strategy.lr_scheduler_configs]
        for optimizer in self.strategy.optimizers:
            check_kept(optimizer)
            if self.lora_plus_ratio != 1 and holds_b(optimizer, self.module):
                mine = [scheduler for scheduler in schedulers if scheduler.optimizer is optimizer]
                apply_lora_plus(optimizer, self.module, self.lora_plus_ratio, *mine)

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """The adapter, what else trains, and the buffers that moved: never a frozen base tensor."""
        trained = {clean_name(name): self._saved(p.detach()) for name, p in kept_parameters(self.module)}
        buffers = persistent_buffers(self.module)
        moved = {name: self._saved(buffer) for name, buffer in buffers.items() if buffer_digest(buffer) != self.buffers.get(name)}
        return trained | moved

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """State by parameter name."""
        return state_by_name(getattr(optimizer, "optimizer", optimizer), self.module, self._saved)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str, storage_options: Any = None) -> None:
        """The checkpoint with what an adapter needs to be known by: format version, config, base."""
        content = AdapterFile(self.config, {}, self.base())
        checkpoint = {**checkpoint, META: content.meta(root=self.root)}
        if saves_shards(self.strategy):
            write_folder(checkpoint, Path(self.strategy.broadcast(filepath)))
        else:
            # Only the first process writes, and the others would wait for one that failed.
            on_first_rank(lambda: Strategy.save_checkpoint(self.strategy, checkpoint, filepath, storage_options=storage_options))

    def load_checkpoint(self, path: str, weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint, file or folder, held against the module; nothing is loaded into it yet.

        Raises:
            ValueError: it is no adapter checkpoint, was made with another config or on another base, or lacks a tensor.
        """
        path = self.strategy.broadcast(path)
        sharded = os.path.isfile(os.path.join(path, REST))
        checkpoint = read_folder(Path(path)) if sharded else self.strategy.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        meta, saved = checkpoint.get(META), checkpoint["state_dict"]
        if meta is None:
            raise ValueError(
                f"{path} was not written under LoRACallback. To start from a full checkpoint load it into the module before fit; to test"
                " it leave LoRACallback out."
            )
        theirs = LoRAConfig(**meta["config"])
        if self.before_load is not None:
            self.before_load(theirs)
        different = theirs.differences(self.config)
        if different:
            raise ValueError(f"{path} was made with another LoRA config (its value != yours): {'; '.join(different)}.")
        missing = sorted(name for name in self._kept_names() if name not in saved)
        if missing:
            raise ValueError(f"{path} lacks {len(missing)} tensors that train here: {', '.join(missing[:4])}.")
        mine = self.base()
        if self.check_base and mine is not None and meta["base"] is not None:
            fingerprint.check_base(mine, meta["base"], str(path))
        unmerge_lora(self.module)
        return checkpoint

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """Copy the checkpoint's tensors into the module, this rank's piece of each.

        Raises:
            ValueError: a tensor has another shape, or (if ``strict``) no place here.
        """
        reshard(self.module)
        places = {clean_name(name): p for name, p in self.module.named_parameters(remove_duplicate=False)} | persistent_buffers(self.module)
        saved = checkpoint["state_dict"]
        unknown = sorted(saved.keys() - places.keys())
        if unknown and strict:
            named = ", ".join(unknown[:4])
            raise ValueError(f"the checkpoint has {len(unknown)} tensors that {type(self.module).__name__} has not: {named}.")
        for name in saved.keys() & places.keys():
            if saved[name].shape != places[name].shape:
                raise ValueError(f"{name} has shape {tuple(saved[name].shape)} in the checkpoint, {tuple(places[name].shape)} here.")
        with torch.no_grad():
            for name in saved.keys() & places.keys():
                local_tensor(places[name]).copy_(local_shard(saved[name], places[name]))
        trainer = self.module.trainer
        if not self.strategy.lightning_restore_optimizer and trainer.state.fn == TrainerFn.FITTING and "optimizer_states" in checkpoint:
            self.load_optimizer_state_dict(checkpoint)  # Lightning leaves it to the strategy then

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Load states by parameter name."""
        saved = checkpoint["optimizer_states"]
        if len(saved) != len(self.strategy.optimizers):
            raise ValueError(f"the checkpoint has {len(saved)} optimizers, configure_optimizers made {len(self.strategy.optimizers)}.")
        for optimizer, state in zip(self.strategy.optimizers, saved, strict=True):
            load_by_name(optimizer, self.module, state)

    def base(self) -> dict[str, Any] | None:
        """The base's identity, read once (under sharding a collective); None if the module came flattened by FSDP1."""
        if self._base is None and not self._flattened:
            self._base = self._base_identity()
        return self._base

    def _base_identity(self) -> dict[str, Any]:
        prefix = f"{self.root}." if self.root else ""
        trained = {name.removeprefix(prefix) for name in self._kept_names()}
        return fingerprint.base_identity(self.module.get_submodule(self.root), trained)

    def _kept_names(self) -> list[str]:
        return [clean_name(name) for name, _ in kept_parameters(self.module)]

    def _saved(self, tensor: Tensor) -> Tensor:
        """What a checkpoint gets of a tensor: all of it, or this rank's piece for a folder of shards."""
        return tensor if saves_shards(self.strategy) else full_tensor(tensor)


def synchronize(module: nn.Module) -> None:
    """Give every rank the first rank's values of the adapter and what else trains, where several ranks hold the same."""
    if not is_distributed():
        return
    world = torch.distributed.group.WORLD
    for _, parameter in kept_parameters(module):
        if not parameter.is_meta:
            broadcast([parameter], parallel.replicas(parameter) if is_sharded(parameter) else [world])


def check_equal(module: nn.Module) -> None:
    """Compare what trains between the processes that hold it whole.

    Raises:
        RuntimeError: it differs, so its gradients were not averaged; the message names the first parameter.
    """
    if not is_distributed():
        return
    mine = {clean_name(name): checksum(p) for name, p in kept_parameters(module) if not is_sharded(p)}
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    different = [name for name in mine if any(other.get(name) != mine[name] for other in everyone)]
    if different:
        raise RuntimeError(
            f"{len(different)} parameters that train differ between processes after the first step: {different[0]} and others. Their"
            " gradients were not averaged: was something injected or unfrozen after the model was wrapped?"
        )


def buffer_digest(buffer: Tensor) -> str:
    """What tells that a buffer changed; a meta buffer has no content yet and counts as changed once it has."""
    return "meta" if buffer.is_meta else checksum(buffer)
