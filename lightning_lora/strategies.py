"""What a Lightning strategy has to do differently under LoRA.

Lightning routes everything that matters here through the strategy: making optimizers, the state dict of a checkpoint,
loading one, optimizer state. A callback's own hooks come too late or not at all (``on_save_checkpoint`` is skipped for
``save_weights_only``, ``on_load_checkpoint`` runs after the weights are in). So :class:`StrategyHooks` puts itself
before those methods on the trainer's strategy *instance*; classes and the user's module stay untouched.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from lightning_lora import fingerprint
from lightning_lora.adapter_files import META, AdapterFile
from lightning_lora.config import LoRAConfig
from lightning_lora.digests import checksum
from lightning_lora.files import write_atomic
from lightning_lora.inject import unmerge_lora
from lightning_lora.layers.base import PREFIX
from lightning_lora.names import clean_name
from lightning_lora.optim.groups import only_trainable
from lightning_lora.optim.state import load_by_name, state_by_name

_SUPPORTED = (SingleDeviceStrategy,)
_HOOKED = (
    "setup_optimizers",
    "lightning_module_state_dict",
    "save_checkpoint",
    "load_checkpoint",
    "optimizer_state",
    "load_optimizer_state_dict",
)


class StrategyHooks:
    """Adapter-only checkpoints, exact resume and frozen-free optimizers for one module under one strategy.

    Args:
        strategy: the trainer's.
        module: the adapted LightningModule.
        root: name of the child that adapter files are relative to ("" for the module itself).
        config: what it was adapted with.
        check_base: refuse checkpoints that were trained on another base.
    """

    def __init__(self, strategy: Strategy, module: LightningModule, root: str, config: LoRAConfig, check_base: bool) -> None:
        self.module, self.root, self.config, self.check_base = module, root, config, check_base
        self.strategy = strategy
        # Persistent buffers as they are before any training or restoring: those that differ later belong into checkpoints.
        self.buffers = {name: buffer_digest(buffer) for name, buffer in persistent_buffers(module).items()}
        self.originals: dict[str, Callable[..., Any]] = {}

    def install(self) -> None:
        """Put the hooks before the strategy's own methods; hooks of an earlier run on the same strategy are replaced."""
        earlier = getattr(self.strategy, "_lora_hooks", None)
        if earlier is not None:
            if earlier.module is self.module:
                self.buffers = earlier.buffers  # the first run's start is what "changed" means
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
        """``configure_optimizers`` with frozen parameters dropped from every optimizer it builds."""
        with only_trainable():
            self.originals["setup_optimizers"](trainer)

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """What trains, and the buffers that moved: never a frozen base tensor."""
        trained = {clean_name(name): p.detach() for name, p in self.module.named_parameters() if p.requires_grad}
        buffers = persistent_buffers(self.module)
        moved = {name: buffer for name, buffer in buffers.items() if buffer_digest(buffer) != self.buffers.get(name)}
        return trained | moved

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str, storage_options: Any = None) -> None:
        """The checkpoint with what an adapter needs to be known by: format version, config, base."""
        child = self.module.get_submodule(self.root)
        extras = self._trained_base(checkpoint["state_dict"])
        content = AdapterFile(self.config, {}, fingerprint.base_identity(child, extras))
        checkpoint = {**checkpoint, META: content.meta(root=self.root)}
        self.originals["save_checkpoint"](checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """An adapter checkpoint completed with the base that is in memory, so that strict loading stays on.

        Raises:
            ValueError: it is no adapter checkpoint, was made with another config or on another base, or lacks a tensor.
        """
        checkpoint = self.originals["load_checkpoint"](path, *args, **kwargs)
        meta, saved = checkpoint.get(META), checkpoint["state_dict"]
        if meta is None:
            raise ValueError(
                f"{path} was not written under LoRACallback. To start from a full checkpoint load it into the module before fit; to test"
                " it leave LoRACallback out."
            )
        different = LoRAConfig(**meta["config"]).differences(self.config)
        if different:
            raise ValueError(f"{path} was made with another LoRA config (its value != yours): {'; '.join(different)}.")
        missing = sorted(
            clean_name(name) for name, p in self.module.named_parameters() if p.requires_grad and clean_name(name) not in saved
        )
        if missing:
            raise ValueError(f"{path} lacks {len(missing)} tensors that train here: {', '.join(missing[:4])}.")
        if self.check_base:
            fingerprint.check_base(self.module.get_submodule(self.root), meta["base"], self._trained_base(saved), str(path))
        unmerge_lora(self.module)
        checkpoint["state_dict"] = {**self.module.state_dict(), **saved}
        return checkpoint

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """State by parameter name."""
        return state_by_name(getattr(optimizer, "_optimizer", optimizer), self.module)

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Load states by parameter name."""
        saved = checkpoint["optimizer_states"]
        if len(saved) != len(self.strategy.optimizers):
            raise ValueError(f"the checkpoint has {len(saved)} optimizers, configure_optimizers made {len(self.strategy.optimizers)}.")
        for optimizer, state in zip(self.strategy.optimizers, saved, strict=True):
            load_by_name(optimizer, self.module, state)

    def _trained_base(self, names: Any) -> set[str]:
        """Of these names, those of base tensors (not A or B), relative to the root."""
        prefix = f"{self.root}." if self.root else ""
        return {name.removeprefix(prefix) for name in names if not name.rpartition(".")[2].startswith(PREFIX)}


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's own, but a crash or a full disk in the middle of a save leaves the file that was there.

    The stock one stages in ``$TMPDIR`` and moves without syncing: with that on another filesystem, a kill in the middle
    leaves an empty file where a good checkpoint was.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Stage beside the target, sync, rename; remote paths go Lightning's way."""
        if storage_options is not None or "local" not in str(getattr(get_filesystem(path), "protocol", "")):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_atomic(path, lambda file: torch.save(checkpoint, file))


def check_supported(strategy: Strategy) -> None:
    """Raise ValueError for a strategy under which LoRA would go wrong in silence."""
    if not isinstance(strategy, _SUPPORTED):
        names = ", ".join(cls.__name__ for cls in _SUPPORTED)
        raise ValueError(f"strategy={type(strategy).__name__}: LoRACallback does not support it yet; there is {names}.")


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Name → buffer, of the buffers that a state dict has."""
    found = {}
    for prefix, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                found[clean_name(f"{prefix}.{name}" if prefix else name)] = buffer
    return found


def buffer_digest(buffer: Tensor) -> str:
    """What tells that a buffer changed; a meta buffer has no content yet and counts as changed once it has."""
    return "meta" if buffer.is_meta else checksum(buffer)
