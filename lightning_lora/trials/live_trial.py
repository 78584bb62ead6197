"""A trial while one ``fit`` trains several: its module, optimizer, random numbers, early stops, and what it has found."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.optim import Optimizer

from lightning_lora.callbacks import LoRACallback
from lightning_lora.callbacks.random_numbers import random_states, restore_random_states
from lightning_lora.trials.one_run import Outcome
from lightning_lora.trials.own_settings import OwnSettings
from lightning_lora.trials.turns import ProcessState, set_torch_random_numbers, torch_random_numbers

KEPT = ("status", "monitor", "mode", "best", "best_step", "steps", "last", "seen", "error")  # of an outcome, in a checkpoint


class TrainerView:
    """A Trainer as one trial sees it: logged values without the trial's name, and a ``should_stop`` of its own.

    Everything else is the Trainer's.
    """

    def __init__(self, trainer: Trainer, trial: str) -> None:
        vars(self).update(should_stop=False, real=trainer, prefix=f"{trial}/")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "should_stop":
            vars(self)[name] = value
        else:
            setattr(self.real, name, value)

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """What the trial has logged."""
        return self._mine(self.real.callback_metrics)

    @property
    def logged_metrics(self) -> dict[str, Any]:
        """Of that, what went to the loggers last."""
        return self._mine(self.real.logged_metrics)

    @property
    def progress_bar_metrics(self) -> dict[str, Any]:
        """Of that, what the bar shows."""
        return self._mine(self.real.progress_bar_metrics)

    def _mine(self, values: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix(self.prefix): value for name, value in values.items() if name.startswith(self.prefix)}


class LiveTrial:
    """A trial of a running ``fit``.

    Args:
        settings: what it has of its own.
        callback: its ``LoRACallback``, which adapts its module.
        stops: the user's early stops; the trial gets copies.
        trainer: of the run.

    Attributes:
        live: False once it has stopped: it is computed no more.
        stepped: True if it has computed a batch of this epoch.
        output: what its last ``training_step`` returned, as Lightning hands it on.
        module: its copy of the user's module.
        optimizer: its own.
        schedulers: Lightning's configurations of its own.
    """

    module: LightningModule
    optimizer: Optimizer
    schedulers: Sequence[Any]

    def __init__(self, settings: OwnSettings, callback: LoRACallback, stops: Sequence[EarlyStopping], trainer: Trainer) -> None:
        self.settings, self.name, self.callback = settings, settings.name, callback
        self.key = key_of(settings.name)
        self.view, self.trainer = TrainerView(trainer, self.name), trainer
        self.stops = [deepcopy(stop) for stop in stops]
        self.outcome = Outcome(self.name, dict(settings.given))
        self.live, self.stepped = True, False
        self.output: dict[str, Any] = {}
        self.begin()

    def begin(self) -> None:
        """Take the random numbers of this moment, or of the trial's seed, as the trial's."""
        outside = ProcessState()
        if self.settings.seed is not None:
            seed_everything(self.settings.seed, workers=os.environ.get("PL_SEED_WORKERS") == "1", verbose=False)
        self._random = _random_numbers()
        outside.restore()

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """What trains, once its module has its adapter."""
        return [p for p in self.module.parameters() if p.requires_grad]

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within it, the process draws this trial's random numbers. Those of Lightning's sanity check are forgotten, as Lightning does."""
        outside = _random_numbers()
        _set_random_numbers(self._random)
        try:
            yield
        finally:
            if not self.trainer.sanity_checking:
                self._random = _random_numbers()
            _set_random_numbers(outside)

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor | None]:
        """Return the gradient of each of :attr:`parameters`. What batches before have accumulated stays as it is."""
        before = [(p, p.grad) for p in self.parameters]
        for p, _ in before:
            p.grad = None
        try:
            with torch.autocast(loss.device.type, enabled=False):
                loss.backward()  # not `autograd.grad`, which reentrant checkpointing refuses
            return [p.grad for p, _ in before]
        finally:
            for p, grad in before:
                p.grad = grad

    def stop(self, status: str, error: str = "") -> None:
        """Stop it: from now on it costs nothing."""
        self.live, self.outcome.status, self.outcome.error = False, status, error
        self.callback._watch = None  # it would miss gradients; those of the others look at the whole module
        for p in self.parameters:
            p.grad = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on with it, of plain types."""
        outcome = {name: deepcopy(getattr(self.outcome, name)) for name in KEPT}
        with self.drawing():
            numbers = random_states(self.trainer)
        return {"live": self.live, "random": numbers, "outcome": outcome, "stops": [stop.state_dict() for stop in self.stops]}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self.live = state["live"]
        outside = _random_numbers()
        restore_random_states(state["random"], self.trainer)
        self._random = _random_numbers()
        _set_random_numbers(outside)
        self.callback.check_gradients &= self.live
        for name, value in state["outcome"].items():
            setattr(self.outcome, name, value)
        for stop, saved in zip(self.stops, state["stops"], strict=False):
            stop.load_state_dict(saved)


def _random_numbers() -> tuple[Any, ...]:
    """Return the states of the process's random numbers, as they are: quicker than those of plain types that checkpoints hold."""
    numpy = sys.modules.get("numpy")
    return torch_random_numbers(), random.getstate(), None if numpy is None else numpy.random.get_state()


def _set_random_numbers(states: tuple[Any, ...]) -> None:
    set_torch_random_numbers(states[0])
    random.setstate(states[1])
    if states[2] is not None:
        sys.modules["numpy"].random.set_state(states[2])


def key_of(name: str) -> str:
    """Return the name of a trial's module in the joint one."""
    return f"trial_{name.replace('.', '_')}"
