"""Replace the methods of a Lightning strategy that must work differently under LoRA.

Lightning calls the strategy to create optimizers, to make and load a checkpoint's state dict, and for optimizer state. A callback's own
hooks run too late or not at all: ``save_weights_only`` skips ``on_save_checkpoint``, and ``on_load_checkpoint`` runs after the weights
are loaded. So :class:`StrategyHooks` replaces those methods on the trainer's strategy *instance*. Classes and the user's module stay
unchanged.

The hooks do the same under every strategy, because they work on single parameters: gather a parameter, take this rank's shard of it, name
it. No hook asks a strategy for a state dict of the model.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_lora.adapter_io.files import META
from lightning_lora.layers.base import kept_parameters
from lightning_lora.model.merge import unmerge_layers, unmerged
from lightning_lora.optim.groups import only_trainable
from lightning_lora.optim.state import load_by_name, state_by_name
from lightning_lora.strategies import flattened, module_state
from lightning_lora.strategies.adapted_part import AdaptedPart, meta_of
from lightning_lora.strategies.changed_state import ChangedState
from lightning_lora.strategies.checkpoint_checks import check_fits, check_parts, check_values, check_whole, naming, nan_states
from lightning_lora.strategies.checkpoint_io import DurableCheckpointIO, found, read, write_folder
from lightning_lora.strategies.copied_hooks import CopiedHooks
from lightning_lora.strategies.equal_ranks import synchronize
from lightning_lora.strategies.finite import check_finite
from lightning_lora.strategies.kept_layers import keeping_adapters
from lightning_lora.strategies.lightning_fields import check_fields
from lightning_lora.strategies.lightning_private import saves_shards
from lightning_lora.strategies.namespaces import twin, twins
from lightning_lora.strategies.new_optimizers import check_trains, prepare
from lightning_lora.utils.messages import counted
from lightning_lora.utils.names import clean_name, persistent_buffers
from lightning_lora.utils.sharding import full_tensor, is_flattened, local_shard, local_tensor, on_first_rank, reshard

#: The strategy's methods that the hooks replace.
REPLACED = (
    "lightning_module_state_dict",
    "save_checkpoint",
    "load_checkpoint",
    "load_model_state_dict",
    "optimizer_state",
    "load_optimizer_state_dict",
)
_HOOKED = ("setup", "setup_optimizers", *REPLACED)  # the first two also call the strategy's own


class StrategyHooks(CopiedHooks):
    """Small checkpoints, exact resume and optimizers without frozen parameters, for one module under one strategy.

    Args:
        strategy: the trainer's strategy.
        module: the adapted LightningModule.
    """

    def __init__(self, strategy: Strategy, module: LightningModule) -> None:
        self.strategy, self.module = strategy, module
        self.parts: dict[str, AdaptedPart] = {}
        self.state = ChangedState.of(module)
        self.originals: dict[str, Callable[..., Any]] = {}
        self.at_end: dict[str, Any] = {}  # what a checkpoint has that is written after the fit
        self._watching: Callable[[], None] | None = None

    @classmethod
    def of(cls, strategy: Strategy, module: LightningModule) -> StrategyHooks:
        """Return the strategy's hooks for this module. Install new ones if it has none, or has those of another module."""
        hooks = getattr(strategy, "_lora_hooks", None)
        if hooks is not None and hooks.module is not module:
            hooks.remove()
            hooks = None
        if hooks is None:
            hooks = cls(strategy, module)
            hooks.install()
        here, state = weakref.ref(strategy), hooks.state  # the state is found by its module: a reference from it would keep the module
        state.wrapped = lambda: model if is_flattened(model := getattr(here(), "model", None) or state.module) else state.module
        return hooks

    def add(self, part: AdaptedPart, training: bool, new: bool) -> None:
        """Add a part. It replaces an earlier part with the same root.

        Args:
            part: the adapted part.
            training: True if it will be trained.
            new: True if it was adapted just now.

        Raises:
            ValueError: its checkpoints cannot be written under this strategy.
        """
        user = module_state.overrides(self.module)
        if user is not None and isinstance(self.strategy, twins(FSDPStrategy)):
            raise ValueError(
                f"{user} overrides how its state dict is made or loaded, and strategy={type(self.strategy).__name__} flattens the"
                " parameters that this needs: use strategy='lora_fsdp2'."
            )
        self.parts[part.root] = part
        self.state.add(part.root, new)
        if training:
            self.state.begin(part.root)

    def drop(self, root: str, forget: bool) -> None:
        """Remove a part. If ``forget``, drop the records of its base too."""
        self.parts.pop(root, None)
        if self.module.__dict__.get("configure_model") is self._watching is not None:
            del self.module.configure_model
        if forget:
            self.state.drop(root)
        if not self.parts:
            self.remove()

    def install(self) -> None:
        """Replace the strategy's methods by the hooks."""
        for name in _HOOKED:
            self.originals[name] = getattr(self.strategy, name)
            setattr(self.strategy, name, getattr(self, name))
        self.strategy._lora_hooks = self  # type: ignore[attr-defined]
        if type(self.strategy.checkpoint_io) in twins(TorchCheckpointIO):
            self.strategy.checkpoint_io = DurableCheckpointIO()

    def remove(self) -> None:
        """Restore the strategy's own methods."""
        for name in self.originals:
            delattr(self.strategy, name)
        del self.strategy._lora_hooks  # type: ignore[attr-defined]

    def watch_configure_model(self) -> None:
        """Wrap the user's ``configure_model``. A module that is built already may shard itself there, which changes no value."""
        original, base = self.module.configure_model, twin(LightningModule, self.module)
        if not is_overridden("configure_model", self.module, base) or "configure_model" in self.module.__dict__:
            return

        @functools.wraps(original)  # Lightning follows __wrapped__ to see that the user overrode the hook
        def configure_model() -> None:
            del self.module.configure_model
            self.state.note()
            with keeping_adapters(self.module):
                original()
            self.state.rebase()

        self._watching = self.module.configure_model = configure_model  # type: ignore[method-assign]

    def setup(self, trainer: Trainer) -> None:
        """Let the strategy wrap and cast the module, which is no change. What changed before is recorded first."""
        self.state.note()
        for part in self.parts.values():
            part.before_setup()
        self.originals["setup"](trainer)
        for part in self.parts.values():
            if part.after_setup is not None:
                part.after_setup()
                part.after_setup = None
        self.state.rebase()

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Call ``configure_optimizers`` with equal adapters on every rank and without frozen parameters. Then prepare what it returned."""
        synchronize(self.module)
        check_trains(self.module)
        with only_trainable():
            self.originals["setup_optimizers"](trainer)
        prepare(self.strategy.optimizers, self.strategy.lr_scheduler_configs, self.module, self.parts.values())

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return everything but what is proved to be the unchanged base (:mod:`lightning_lora.strategies.changed_state`)."""
        tensors = self.state.tensors(self._saved)
        if not isinstance(self.strategy, twins(FSDPStrategy)):  # FSDP1 would gather the base to make a state dict
            with unmerged(self.module) if module_state.overrides(self.module) else nullcontext():
                theirs = module_state.state_of_user(self.module)
                if theirs is not None:
                    named = module_state.parameters_by_name(self.module)
                    base: dict[str, Tensor] = {name: p for name, _, _, p in named if not self.state.holds(name)}
                    kept = module_state.without_base(theirs, base)
                    return {key: self._saved(value).clone() if isinstance(value, Tensor) else value for key, value in kept.items()}
        buffers = {name: self._saved(buffer) for name, buffer in persistent_buffers(self.module).items()}
        extra = {name: child.get_extra_state() for name, child in module_state.extra_states(self.module).items()}
        return tensors | buffers | extra

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the optimizer's state by parameter name: all of it on the first process at least."""
        theirs = optimizer.optimizer if isinstance(optimizer, twins(LightningOptimizer)) else optimizer
        return state_by_name(theirs, self.module, self._saved)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str, storage_options: Any = None) -> None:
        """Write the checkpoint, with the metadata that identifies its adapter: format version, config, base."""
        check_whole(checkpoint)
        names = self._covered(tensors := checkpoint["state_dict"])
        meta = meta_of(self.parts, lambda root: self.state.identity(root, names))
        trains = {clean_name(name) for name, _ in kept_parameters(self.module)}
        if not any(part.allow_nonfinite for part in self.parts.values()):
            check_finite(self.strategy, {name: tensors[name] for name in tensors if name in trains}, nan_states(checkpoint))
        beside, after = sorted(tensors.keys() - trains), self.at_end if "optimizer_states" in checkpoint else {}
        checkpoint = {**after, **checkpoint, META: {**meta, "beside": beside} if beside else meta}
        if saves_shards(self.strategy):
            write_folder(checkpoint, Path(self.strategy.broadcast(filepath)))
        else:
            # Only the first process writes. If it fails, the others must raise too, not wait for it.
            on_first_rank(lambda: Strategy.save_checkpoint(self.strategy, checkpoint, filepath, storage_options=storage_options))

    def load_checkpoint(self, path: str, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, file or folder, and check it against the module. Nothing is loaded into the module yet.

        Raises:
            ValueError: it is no adapter checkpoint, was made with another config or on another base, or lacks a tensor.
        """
        path = found(self.strategy.broadcast(path))
        checkpoint = read(self.strategy.checkpoint_io, path, weights_only)
        metas = check_parts(checkpoint, self.parts, path)
        check_fields(checkpoint, self.module.trainer, path)
        if not any(part.allow_nonfinite for part in self.parts.values()):
            check_values(checkpoint, path, self.module.trainer.state.fn == TrainerFn.FITTING)
        missing = self.state.required(names := self._covered(checkpoint["state_dict"]))
        theirs = None if isinstance(self.strategy, twins(FSDPStrategy)) else module_state.state_of_user(self.module)
        if theirs is not None:  # what a user's state dict leaves out is not required
            missing = sorted(module_state.names_in(theirs, self.module).intersection(missing))
        if missing:
            raise ValueError(f"{path} lacks {counted(len(missing), 'trained tensor')}: {', '.join(missing[:4])}.")
        for root, meta in metas.items():
            if self.parts[root].check_base and meta["base"] is not None:
                self.state.check_base(root, names, meta["base"], str(path))
        self.state.check_reset(names, str(path))
        return checkpoint

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """Copy the checkpoint's tensors, this rank's shard of each, into the module. Reset what the checkpoint leaves out.

        Raises:
            ValueError: a tensor has another shape, or (if ``strict``) no place here.
        """
        reshard(self.module)
        saved = checkpoint["state_dict"]
        by_user = not isinstance(self.strategy, twins(FSDPStrategy)) and module_state.state_of_user(self.module) is not None
        if not by_user:
            with naming(self.module.trainer.ckpt_path):
                self._check(saved, strict)
        unmerge_layers(self.module)
        reset, theirs = self.state.reset(self._covered(saved)), module_state.state_of_user(self.module) if by_user else None
        if theirs is not None:
            module_state.load_users(self.module, theirs, saved, strict)
        else:
            self._load(saved)
        self._write(reset)
        trainer = self.module.trainer
        if not self.strategy.lightning_restore_optimizer and trainer.state.fn == TrainerFn.FITTING and "optimizer_states" in checkpoint:
            self.load_optimizer_state_dict(checkpoint)  # Lightning leaves this to such a strategy

    def _check(self, saved: dict[str, Any], strict: bool) -> None:
        places, extra = flattened.places(self.state.wrapped(), saved), module_state.extra_states(self.module)
        unknown = sorted(saved.keys() - places.keys() - extra.keys())
        if unknown and strict:
            many, mine = counted(len(unknown), "tensor"), type(self.module).__name__
            raise ValueError(f"the checkpoint has {many} that {mine} does not have: {', '.join(unknown[:4])}.")
        check_fits(saved, places, module_state.places(self.module))
        lacking = sorted(extra.keys() - saved.keys())
        if lacking and strict:
            raise ValueError(f"the checkpoint lacks the extra state of {counted(len(lacking), 'module')}: {', '.join(lacking[:4])}.")

    def _load(self, saved: dict[str, Any]) -> None:
        extra = module_state.extra_states(self.module)
        self._write({name: value for name, value in saved.items() if name not in extra})
        for name in saved.keys() & extra.keys():
            extra[name].set_extra_state(saved[name])

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        """Copy values, full or this rank's shard, into the parameters and buffers of these names."""
        for place, value in flattened.writable(self.state.wrapped(), values):
            if place.is_meta:  # a copy to there does nothing
                raise ValueError(f"{type(self.module).__name__} is on the meta device: give it its weights before a checkpoint is loaded.")
            local_tensor(place).copy_(value if value.shape == local_tensor(place).shape else local_shard(value, place))

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Load optimizer states by parameter name."""
        saved, here = checkpoint["optimizer_states"], self.strategy.optimizers
        with naming(self.module.trainer.ckpt_path):
            if len(saved) != len(here):
                raise ValueError(f"the checkpoint has {counted(len(saved), 'optimizer')}, but configure_optimizers made {len(here)}.")
            for optimizer, state in zip(here, saved, strict=True):
                load_by_name(optimizer, self.module, state)

    def _covered(self, saved: dict[str, Any]) -> set[str]:
        """Return the names of the module's tensors that a checkpoint's state dict has values for."""
        return set(saved) if isinstance(self.strategy, twins(FSDPStrategy)) else module_state.names_in(saved, self.module)

    def _saved(self, tensor: Tensor) -> Tensor:
        """Return what a checkpoint holds of a tensor: the full tensor, or this rank's shard for a folder of shards."""
        return tensor if saves_shards(self.strategy) else full_tensor(tensor)
