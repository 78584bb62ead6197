"""What a trial of :class:`~lightning_lora.Trials` has of its own: fields of the config, options of the callback, rates, a seed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from lightning.pytorch import LightningModule
from torch.optim import Optimizer

from lightning_lora.callbacks import LoRACallback
from lightning_lora.config import LoRAConfig
from lightning_lora.optim.groups import check_ratio
from lightning_lora.optim.preconditioning import check_known
from lightning_lora.trials.naming import name_trials, text_of

FIELDS = tuple(field.name for field in fields(LoRAConfig))
OPTIONS: dict[str, Callable[[Any], None]] = {"lora_plus_ratio": check_ratio, "precondition": check_known}  # of the callback → their checks
#: Trial's key → the names under which a module may have it, as Lightning's learning-rate finder looks for it; key of a group.
RATES = {"learning_rate": (("learning_rate", "lr"), "lr"), "weight_decay": (("weight_decay",), "weight_decay")}
LARGEST_SEED = 2**32 - 1  # numpy's


@dataclass(frozen=True)
class OwnSettings:
    """The settings of one trial, checked.

    Attributes:
        name: its name.
        given: as the user gave them, without the name.
        config: what it adapts.
        options: options of its ``LoRACallback``.
        rates: ``learning_rate`` and ``weight_decay``, those that are given.
        seed: its random numbers begin as after ``seed_everything``; None: as those of the run.
    """

    name: str
    given: Mapping[str, Any]
    config: LoRAConfig
    options: Mapping[str, Any]
    rates: Mapping[str, float]
    seed: int | None

    @property
    def text(self) -> str:
        """The settings as text, by which a checkpoint's trials are known again."""
        return text_of(dict(self.given))


def check_trials(trials: Any) -> list[dict[str, Any]]:
    """Check what can be known without a config. Return a copy of the trials.

    Raises:
        ValueError: they are no list of settings; a key is unknown, or a value out of range; or two names are equal.
    """
    if not isinstance(trials, Sequence) or isinstance(trials, str) or not trials:
        raise ValueError(f"trials={trials!r} must be a list of settings, such as [{{'rank': 4}}, {{'rank': 16}}].")
    known = ("name", *FIELDS, *OPTIONS, *RATES, "seed")
    for number, each in enumerate(trials):
        where = f"trials[{number}]"
        if not isinstance(each, Mapping) or not each:
            raise ValueError(f"{where}={each!r} must be a mapping with names, such as {{'rank': 4}}.")
        if unknown := [key for key in each if key not in known]:
            raise ValueError(f"{where}: {unknown[0]!r} is not known; a trial may have {', '.join(known)}.")
        for key in RATES.keys() & each.keys():
            value = each[key]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{where}: {key}={value!r}: give a finite number ≥ 0, such as 1e-4.")
        seed = each.get("seed", 0)
        if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"{where}: seed={seed!r}: give a whole number from 0 to {LARGEST_SEED}.")
        with _named(where):
            for key in OPTIONS.keys() & each.keys():
                OPTIONS[key](each[key])
            LoRAConfig(**{key: value for key, value in each.items() if key in FIELDS})
    name_trials(trials)
    return [copy.deepcopy(dict(each)) for each in trials]


def read_settings(trials: Sequence[Mapping[str, Any]], callback: LoRACallback) -> list[OwnSettings]:
    """Return each trial's settings, over those of the user's callback.

    Raises:
        ValueError: a trial's config is wrong.
    """
    found = []
    for number, (name, given) in enumerate(name_trials(trials)):
        with _named(f"trials[{number}]"):
            config = replace(callback.config, **{key: value for key, value in given.items() if key in FIELDS})
        options = {key: given[key] for key in OPTIONS if key in given}
        rates = {key: float(given[key]) for key in RATES if key in given}
        found.append(OwnSettings(name, given, config, options, rates, given.get("seed")))
    return found


@contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


@contextmanager
def at_rates(module: LightningModule, settings: OwnSettings) -> Iterator[list[Optimizer]]:
    """Within it, a trial's module makes its optimizer with the trial's rates. Yields a list for the optimizers that it made.

    A module that has the value as an attribute or hyperparameter gets it there. Elsewhere the optimizer's groups get it when they are made,
    before a scheduler reads them.

    Raises:
        ValueError: at the end, no group of an optimizer has the rate.
    """
    forced: dict[str, float] = {}
    for key, value in settings.rates.items():
        names, group_key = RATES[key]
        places = [name for name in names if hasattr(module, name) or name in module.hparams]
        for name in places:
            if hasattr(module, name):
                setattr(module, name, value)
            if name in module.hparams:
                module.hparams[name] = value
        if not places:
            forced[group_key] = value
    original = Optimizer.add_param_group

    def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
        for key, value in forced.items():
            if key in param_group:
                raise ValueError(_unread(settings.name, module, key, f"gives groups a {key} of their own"))
            param_group[key] = value
        original(self, param_group)

    made: list[Optimizer] = []
    Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    try:
        yield made
    finally:
        Optimizer.add_param_group = original  # type: ignore[method-assign]
    for key, value in settings.rates.items():
        at = (RATES[key][1], "initial_lr", "max_lr") if key == "learning_rate" else (RATES[key][1],)
        groups = [group for optimizer in made for group in optimizer.param_groups]
        if not any(float(group[each]) == value for group in groups for each in at if group.get(each) is not None):
            raise ValueError(_unread(settings.name, module, RATES[key][1], f"made groups without {key}={value:g}"))


def _unread(trial: str, module: LightningModule, group_key: str, why: str) -> str:
    key = next(key for key, (_, of_group) in RATES.items() if of_group == group_key)
    return (
        f"trial {trial!r}: configure_optimizers of {type(module).__name__} {why}, so the trial's {key} would have no effect: read it from"
        f" self.{key} there, which each trial has its own of."
    )
