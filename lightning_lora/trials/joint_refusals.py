"""Refuse, before anything changes, a run of ``LoRACallback(sweep=Trials(...))`` whose trials would not be what separate runs are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_lora.callbacks import LoRACallback
from lightning_lora.layers.base import lora_layers
from lightning_lora.registry import data_of
from lightning_lora.strategies.namespaces import twins
from lightning_lora.trials.joint_module import REFUSED
from lightning_lora.trials.live_trial import key_of
from lightning_lora.trials.own_settings import OwnSettings

FUNCTION = "use the function sweep, which runs each trial by a Trainer of its own"
#: Options of the callback that work on one model, or on its base.
OF_ONE = ("quantize", "merge_quantized", "compile", "offload", "weights", "merge_max_lost")


def check_run(callback: LoRACallback, trainer: Trainer, module: LightningModule, settings: Sequence[OwnSettings]) -> None:
    """Raise ValueError, with the name of what it is and the fix, if a run cannot train several trials.

    Args:
        callback: the user's.
        trainer: before it has done anything.
        module: the user's.
        settings: of the trials.
    """
    for reason in _reasons(callback, trainer, module, settings):
        if reason:
            raise ValueError(f"sweep: {reason}.")


def _reasons(callback: LoRACallback, trainer: Any, module: LightningModule, settings: Sequence[OwnSettings]) -> Sequence[str]:
    """Return why not; an empty string where nothing speaks against it."""
    others = [each for each in trainer.callbacks if isinstance(each, LoRACallback)]
    stops = [each for each in trainer.callbacks if isinstance(each, twins(EarlyStopping))]
    savers = [each for each in trainer.callbacks if isinstance(each, twins(ModelCheckpoint)) and each.monitor is not None]
    names = [each.name for each in settings]
    keys = [key_of(name) for name in names]
    twice = [name for name, key in zip(names, keys, strict=True) if keys.count(key) > 1]
    options = [name for name in OF_ONE if getattr(callback, name)]
    hooks = [name for name in REFUSED if is_overridden(name, module)] if isinstance(module, LightningModule) else []
    adapted = next((name for name, _ in lora_layers(module)), None)
    inits = [each for each in settings if data_of(each.config.init) is not None]
    return [
        "" if isinstance(trainer, Trainer) else "pytorch_lightning's Trainer is not supported here; import both from lightning",
        ""
        if trainer.state.fn == TrainerFn.FITTING
        else f"{trainer.state.fn} has no trial to run; load one with load_adapter, and leave sweep out",
        "" if type(callback) is LoRACallback else f"{type(callback).__name__} changes ranks while it trains; {FUNCTION}",
        "" if len(others) == 1 else f"the Trainer has {len(others)} LoRACallbacks, and a sweep has one; give the trials what differs",
        f"the trials {twice[0]!r} and {twice[1]!r} differ in dots only; give one another name" if twice else "",
        f"{options[0]}={getattr(callback, options[0])!r} works on one model, and trials share its base; leave it out, or {FUNCTION}"
        if options
        else "",
        ""
        if isinstance(trainer.strategy, twins(SingleDeviceStrategy))
        else f"strategy={type(trainer.strategy).__name__} is for several devices, and trials share one; set devices=1",
        f"precision={trainer.precision} has one loss scale for all trials; use bf16-mixed" if trainer.precision == "16-mixed" else "",
        "the plugin BitsandbytesPrecision would quantize a base for each trial; load the base quantized"
        if isinstance(trainer.precision_plugin, twins(BitsandbytesPrecision))
        else "",
        "" if module.automatic_optimization else f"{type(module).__name__} optimizes manually, with one optimizer; {FUNCTION}",
        f"{type(module).__name__} overrides {hooks[0]}, which would have to do for all trials what it does for one; {FUNCTION}"
        if hooks
        else "",
        f"{adapted!r} has LoRA already; unload_lora(module, merged='drop') first" if adapted else "",
        f"init={inits[0].config.init!r} of the trial {inits[0].name!r} reads data through the Trainer; {FUNCTION}" if inits else "",
        f"{type(savers[0]).__name__}(monitor={savers[0].monitor!r}): a checkpoint holds all trials; leave monitor out, or name one trial's:"
        f" {names[0]}/{savers[0].monitor}. Trials(folder=...) keeps each trial's best adapter"
        if savers and not any(str(savers[0].monitor).startswith(f"{name}/") for name in names)
        else "",
        "EarlyStopping with min_epochs or min_steps would stop trials before; leave one of them out"
        if stops and ((trainer.min_epochs or 0) > 1 or trainer.min_steps)
        else "",
    ]
