"""One optimizer and one scheduler in Lightning's eyes, that are each trial's own.

Lightning's automatic optimization takes one optimizer. This one has the groups and the state of all: of the same dicts, so that what a
trial's scheduler sets is in a checkpoint, and what a checkpoint sets is in the trial's optimizer. A step is a step of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_lora.strategies.lightning_private import configured
from lightning_lora.strategies.new_optimizers import prepare
from lightning_lora.trials.live_trial import LiveTrial
from lightning_lora.trials.own_settings import at_rates


class JointOptimizer(Optimizer):
    """The optimizers of several trials.

    Args:
        trials: each with its optimizer, which has taken no step yet.

    Raises:
        ValueError: an optimizer saves its state in a way of its own, or must be called with a closure.
    """

    def __init__(self, trials: Sequence[LiveTrial]) -> None:
        for trial in trials:
            _check(trial)
        self.trials = trials
        super().__init__([p for trial in trials for group in trial.optimizer.param_groups for p in group["params"]], {})
        self.param_groups = [group for trial in trials for group in trial.optimizer.param_groups]
        for trial in trials:
            trial.optimizer.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Compute the gradients of all, and let each trial's optimizer take a step. One that has stopped takes none."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for trial in self.trials:
            if trial.live:
                trial.optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, and give each trial's optimizer its part."""
        super().load_state_dict(state_dict)
        groups = iter(self.param_groups)
        for trial in self.trials:
            mine = [next(groups) for _ in trial.optimizer.param_groups]
            trial.optimizer.__setstate__({"state": self.state, "param_groups": mine})


class JointScheduler(LRScheduler):
    """The schedulers of several trials, at one place of what ``configure_optimizers`` returns.

    Args:
        optimizer: the joint one.
        trials: each with its schedulers.
        place: of these schedulers among a trial's.
    """

    def __init__(self, optimizer: JointOptimizer, trials: Sequence[LiveTrial], place: int) -> None:
        self.optimizer, self.trials, self.place = optimizer, trials, place

    def step(self, epoch: int | None = None) -> None:
        """Step the scheduler of each trial that has not stopped, as its module does."""
        for trial in self.trials:
            if trial.live:
                trial.module.lr_scheduler_step(trial.schedulers[self.place].scheduler, None)

    def get_last_lr(self) -> list[Any]:
        """Return the rates of all groups."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return trial → the state of its scheduler."""
        return {trial.name: trial.schedulers[self.place].scheduler.state_dict() for trial in self.trials}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        for trial in self.trials:
            trial.schedulers[self.place].scheduler.load_state_dict(state_dict[trial.name])


def _check(trial: LiveTrial) -> None:
    cls = type(trial.optimizer)
    if isinstance(trial.optimizer, torch.optim.LBFGS):
        raise ValueError(f"trial {trial.name!r}: {cls.__name__} computes the loss several times a step; use the function sweep for it.")
    if any(getattr(cls, name) is not getattr(Optimizer, name) for name in ("state_dict", "load_state_dict")):
        raise ValueError(
            f"trial {trial.name!r}: {cls.__name__} saves its state in a way of its own, in which trials cannot be told apart; use another"
            " optimizer, or the function sweep."
        )


def configure_jointly(trials: Sequence[LiveTrial]) -> tuple[list[Optimizer], list[dict[str, Any]]]:
    """Let each trial's module make its optimizer and schedulers, and return the joint ones, as ``configure_optimizers`` does.

    Args:
        trials: get their optimizers and schedulers.

    Raises:
        ValueError: a trial's rate would have no effect, or its optimizers or schedulers cannot be joint.
    """
    for trial in trials:
        with at_rates(trial.module, trial.settings) as made:
            optimizers, trial.schedulers = configured(trial.module)
            made += optimizers
            if not optimizers[0].param_groups:
                raise ValueError(f"trial {trial.name!r}: configure_optimizers returned no optimizer.")
        trial.optimizer, part = optimizers[0], trial.callback.part
        vars(trial.view).update(optimizers=optimizers, lr_scheduler_configs=trial.schedulers)  # modules log rates from them
        assert part is not None
        own = replace(part, root=part.root.removeprefix(trial.key).removeprefix("."))
        prepare(optimizers, trial.schedulers, trial.module, [own])
        part.lora_plus_ratio, part.precondition = 1.0, None  # the strategy's hooks prepare the joint one too
        groups = trial.optimizer.param_groups
        for k, group in enumerate(groups):  # the names that LearningRateMonitor logs
            group["name"] = "/".join([trial.name, *([str(group.get("name", k))] if len(groups) > 1 else [])])
    first = trials[0].schedulers
    for trial in trials:
        for config in trial.schedulers:
            if config.reduce_on_plateau:
                raise ValueError(
                    f"trial {trial.name!r}: {type(config.scheduler).__name__} looks at a metric, and Lightning knows one for all trials;"
                    " use another scheduler, or the function sweep."
                )
        if [(each.interval, each.frequency) for each in trial.schedulers] != [(each.interval, each.frequency) for each in first]:
            raise ValueError(f"trial {trial.name!r}: configure_optimizers makes other schedulers than for {trials[0].name!r}.")
    optimizer = JointOptimizer(trials)
    places = [
        {"scheduler": JointScheduler(optimizer, trials, k), "interval": each.interval, "frequency": each.frequency, "name": each.name}
        for k, each in enumerate(first)
    ]
    return [optimizer], places
