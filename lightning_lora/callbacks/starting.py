"""Start a run from an adapter on disk, and say which of two things the run does: start from it, or resume a checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from weakref import ref

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_lora.adapter_io.save_load import load_adapter
from lightning_lora.adapter_io.starting import starting_config
from lightning_lora.callbacks.start_report import log_advice
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import lora_layers
from lightning_lora.strategies.adapted_part import AdaptedPart
from lightning_lora.strategies.fsdp2 import offer_to_others
from lightning_lora.strategies.lightning_private import resumed_from, see_mixed_imports
from lightning_lora.utils.names import adapter_root, clean_name, join


def see_others() -> None:
    """Let Lightning know ``strategy="lora_fsdp2"`` and say which package a module of the other one is from. Making a callback calls it."""
    see_mixed_imports()
    offer_to_others()


class Start:
    """The adapter that a run starts from. It is loaded once per module: a second ``fit`` trains what is there.

    Args:
        path: an adapter folder, or a checkpoint written under ``LoRACallback``.

    Raises:
        ValueError: the path is empty.
    """

    def __init__(self, path: str) -> None:
        if not path:
            raise ValueError("start_from='' is empty; name an adapter folder or a checkpoint (.ckpt).")
        self.path = path
        self._loaded: ref[nn.Module] | None = None  # the module that has it

    def __getstate__(self) -> dict[str, Any]:
        """Return the path: a copy has loaded nothing."""
        return {"path": self.path, "_loaded": None}

    def config(self, target: nn.Module, given: LoRAConfig) -> LoRAConfig:
        """Return the config to adapt the module with: the adapter's, or ``given`` once the adapter is loaded."""
        return given if self._has(target) else starting_config(target, self.path, given)

    def load(self, target: nn.Module, undo: ExitStack, check_base: bool, allow_nonfinite: bool) -> None:
        """Load the adapter into the adapted module. ``undo`` gets a function that puts the values back."""
        if self._has(target):
            return
        before = [(tensor, tensor.detach().clone()) for tensor in (*filter(_trains, target.parameters()), *target.buffers())]
        undo.callback(self._restore, before, self._loaded)
        load_adapter(target, self.path, check_base=check_base, allow_nonfinite=allow_nonfinite)
        self._loaded = ref(target)

    def _has(self, target: nn.Module) -> bool:
        return self._loaded is not None and self._loaded() is target

    def _restore(self, before: list[tuple[torch.Tensor, torch.Tensor]], loaded: ref[nn.Module] | None) -> None:
        self._loaded = loaded
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


def part_root(callback: Any, target: nn.Module) -> str:
    """Return the name of the submodule that the names of a ``LoRACallback``'s layers are relative to."""
    return join(callback.module or "", adapter_root(target)[0])


def adapted_part(callback: Any, target: nn.Module) -> AdaptedPart:
    """Return what a strategy's hooks have to know of the part that a ``LoRACallback`` adapted."""
    root = part_root(callback, target)
    layers = [clean_name(name) for name, _ in lora_layers(target)]
    return AdaptedPart(
        root, callback.config, callback.check_base, callback.lora_plus_ratio, callback.allow_nonfinite, layers, callback.precondition
    )


def _trains(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def log_beginning(trainer: Trainer, target: nn.Module, start_from: str | None) -> None:
    """Log which of the two a training does, resume a checkpoint or start from an adapter, and what decides how well it learns."""
    resumed = resumed_from(trainer)
    if resumed is not None:
        over = "" if start_from is None else f" Nothing of start_from={start_from!r} stays: it is for a run without ckpt_path."
        rank_zero_info(f"Resumes {resumed} at step {trainer.global_step}: its weights, its optimizer's state, its place in the data.{over}")
    elif start_from is not None:
        rank_zero_info(
            f"Starts from the adapter {start_from}: its weights, with a new optimizer at step 0. To go on with an interrupted run, give its"
            " checkpoint as ckpt_path."
        )
    log_advice(trainer, target)
