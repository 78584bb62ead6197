"""Refuse, before anything changes, a run of ``LoRACallback(sweep=Trials(...))`` whose trials would not be what separate runs are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_lora.callbacks import LoRACallback
from lightning_lora.layers.base import lora_layers
from lightning_lora.registry import data_of
from lightning_lora.strategies.namespaces import of_second, twin, twins
from lightning_lora.strategies.support import check_supported
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
    reason = _of_trainer(trainer) or _of_callbacks(trainer, settings) or _of_module(module) or _of_settings(callback, settings)
    if reason is not None:
        raise ValueError(f"sweep: {reason}.")
    check_supported(trainer)


def _of_trainer(trainer: Any) -> str | None:
    """Return why a trainer cannot run trials, None if it can."""
    if of_second(trainer):
        return "the Trainer is pytorch_lightning's; import Trainer and module from lightning"
    if (stage := trainer.state.fn) != TrainerFn.FITTING:
        return f"{getattr(stage, 'value', stage)} has no trial to run; load one with load_adapter, and leave sweep out"
    if not isinstance(trainer.strategy, twins(SingleDeviceStrategy)):
        return f"strategy={type(trainer.strategy).__name__} is for several devices, and trials share one; set devices=1"
    if trainer.precision == "16-mixed":
        return "precision=16-mixed has one loss scale for all trials; use bf16-mixed"
    if isinstance(trainer.precision_plugin, twins(BitsandbytesPrecision)):
        return "the plugin BitsandbytesPrecision would quantize a base for each trial; load the base quantized"
    return None


def _of_callbacks(trainer: Any, settings: Sequence[OwnSettings]) -> str | None:
    others = [each for each in trainer.callbacks if isinstance(each, LoRACallback)]
    if len(others) > 1:
        return f"the Trainer has {len(others)} LoRACallbacks, and a sweep has one; give the trials what differs"
    names = [f"{each.name}/" for each in settings]
    for each in trainer.callbacks:
        if isinstance(each, twins(ModelCheckpoint)) and each.monitor is not None and not each.monitor.startswith(tuple(names)):
            return (
                f"{type(each).__name__}(monitor={each.monitor!r}): a checkpoint holds all trials; leave monitor out, or name one trial's"
                f" {names[0]}{each.monitor}. Trials(folder=...) keeps the best adapter of each trial"
            )
        if isinstance(each, twins(EarlyStopping)) and (own := next((n for n in names if each.monitor.startswith(n)), None)):
            return f"EarlyStopping(monitor={each.monitor!r}) stops each trial by its own value; name it {each.monitor.removeprefix(own)!r}"
        if isinstance(each, twins(LearningRateFinder, BatchSizeFinder)):
            return f"{type(each).__name__} tries one run; find the value without sweep, and give it to the trials"
        if isinstance(each, twins(EarlyStopping)) and ((trainer.min_epochs or 0) > 1 or trainer.min_steps):
            return "EarlyStopping with min_epochs or min_steps would stop trials before; leave one of them out"
    return None


def _of_module(module: LightningModule) -> str | None:
    name = type(module).__name__
    if not module.automatic_optimization:
        return f"{name} optimizes manually, with one optimizer; {FUNCTION}"
    if hooks := [hook for hook in REFUSED if is_overridden(hook, module, twin(LightningModule, module))]:
        return f"{name} overrides {hooks[0]}, which would have to do for all trials what it does for one; {FUNCTION}"
    if adapted := next((fqn for fqn, _ in lora_layers(module)), None):
        return f"{adapted!r} has LoRA already; unload_lora(module, merged='drop') first"
    return None


def _of_settings(callback: LoRACallback, settings: Sequence[OwnSettings]) -> str | None:
    if type(callback) is not LoRACallback:
        return f"{type(callback).__name__} changes ranks while it trains; {FUNCTION}"
    if options := [name for name in OF_ONE if getattr(callback, name)]:
        value = getattr(callback, options[0])
        return f"{options[0]}={value!r} works on one model, and trials share its base; leave it out, or {FUNCTION}"
    keys = [key_of(each.name) for each in settings]
    if twice := [each.name for each, key in zip(settings, keys, strict=True) if keys.count(key) > 1]:
        return f"the trials {twice[0]!r} and {twice[1]!r} differ in dots only; give one another name"
    for each in settings:
        if data_of(each.config.init) is not None:
            return f"init={each.config.init!r} of the trial {each.name!r} reads data through the Trainer; {FUNCTION}"
    return None
