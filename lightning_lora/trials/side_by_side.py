"""Run trials: several at once, each by an ordinary ``Trainer.fit``, over one base in memory.

A trial runs until it needs the loss of a training batch. When all that run have come to that point, one joint step computes their losses
and gradients (:mod:`lightning_lora.trials.joint_step`), and each goes on: its optimizer, schedulers, validation, loggers, early stop and
checkpoints are its own. Trials may differ in their number of steps, and one that ends makes room for the next.

Where joint steps are not exact, the trials run one after another, and the log says why.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.callbacks import LoRACallback
from lightning_lora.trials.joint_step import JointStep, Member, why_not
from lightning_lora.trials.one_run import OneRun, Outcome
from lightning_lora.trials.shared_base import SharedBase
from lightning_lora.trials.turns import Turn

Made = tuple[Trainer, LightningModule, Callable[[], Any]]  # the third one fits


@dataclass
class Trial:
    """A run to make.

    Attributes:
        name: its name.
        settings: what it has of its own, for reports.
        make: makes trainer and module, and a function that fits. It runs in the trial's own turn.
        outcome: how it stands.
    """

    name: str
    settings: Mapping[str, Any]
    make: Callable[[], Made]
    outcome: Outcome = field(init=False)

    def __post_init__(self) -> None:
        self.outcome = Outcome(self.name, dict(self.settings))


class SideBySide:
    """Runs trials.

    Args:
        at_once: trials in memory at most.
        side_by_side: joint steps: "auto", where they are exact; True, or an error; False, never.
        changed: called when an outcome has changed.

    Attributes:
        reason: why there are no joint steps; None while there are.
        joint: what computes them.
    """

    def __init__(self, at_once: int = 8, side_by_side: bool | Literal["auto"] = "auto", changed: Callable[[], None] = lambda: None) -> None:
        if at_once < 1:
            raise ValueError(f"at_once={at_once} must be at least 1.")
        self.at_once, self.required, self.changed = at_once, side_by_side is True, changed
        self.joint, self.base = JointStep(), SharedBase()
        self.reason = None if side_by_side and at_once > 1 else "as told"
        self.stopped: signal.Signals | None = None
        self._live: list[tuple[Trial, Turn]] = []
        self._answers: dict[Turn, Any] = {}

    def run(self, trials: Sequence[Trial]) -> None:
        """Run all. A trial that fails after its first batch is noted, and the others go on.

        Raises:
            ValueError: a trial was refused before it trained; or joint steps are required and not exact.
            KeyboardInterrupt, SystemExit: the runs were told to stop, and have left checkpoints to resume from.
        """
        waiting = deque(trials)
        try:
            with self._until_told_to_stop():
                while (waiting and not self.stopped) or self._live:
                    while waiting and not self.stopped and len(self._live) < (1 if self.reason else self.at_once):
                        self._begin(waiting.popleft())
                    self._step()
                    for trial, turn in list(self._live):
                        if not turn.resume(self._answers.pop(turn, None)):
                            self._end(trial, turn)
        except BaseException as error:
            for _, turn in self._live:
                while turn.resume(error):
                    pass
            raise
        if self.stopped == signal.SIGINT:
            raise KeyboardInterrupt("the trials have stopped, with checkpoints to resume from")
        if self.stopped:
            raise SystemExit(128 + self.stopped)

    def _begin(self, trial: Trial) -> None:
        """Let a trial run until it needs a joint step, or has ended."""
        turn = Turn(lambda: self._fit(trial, turn))
        self._live.append((trial, turn))
        if not turn.resume():
            self._end(trial, turn)

    def _fit(self, trial: Trial, turn: Turn) -> None:
        trainer, module, fit = trial.make()

        def share(module: LightningModule, callback: LoRACallback) -> None:
            differ = self.base.share(module, str(trainer.precision))
            reason = f"{differ[0]} differs between the trials" if differ else why_not(module, callback)
            if reason is not None:
                self._give_up(reason)

        def ask(module: LightningModule, batch: Any) -> Any:
            if (name := self.base.trains()) is not None:
                raise RuntimeError(f"{name} is shared by all trials, and {trial.name} trains it; list it in modules_to_save.")
            if self.reason is not None:
                return None
            parameters = [p for p in module.parameters() if p.requires_grad]
            answer = turn.ask((Member(turn, module, trainer, parameters), batch))
            return None if answer is None else answer.as_loss(parameters)

        OneRun(trial.outcome, share, ask, self.changed, lambda: self.stopped is not None).join(trainer, module)
        fit()

    def _step(self) -> None:
        """Compute a joint step for all that wait for one."""
        if len(self._live) < 2 or self.reason is not None:
            return
        turns = [turn for _, turn in self._live]
        members, batches = zip(*(turn.request for turn in turns), strict=True)
        try:
            results = self.joint(members, batches)
        except ValueError as reason:
            self._give_up(str(reason))
            return
        self._answers = dict(zip(turns, results, strict=True))

    def _give_up(self, reason: str) -> None:
        """Compute no joint steps from now on."""
        if self.reason is not None:
            return
        if self.required:
            raise ValueError(f"side_by_side=True: {reason}. Leave it out, and the trials run one after another.")
        self.reason = reason
        rank_zero_info(f"The trials run one after another: {reason}.")

    def _end(self, trial: Trial, turn: Turn) -> None:
        """Note how a trial has ended."""
        self._live.remove((trial, turn))
        outcome, error = trial.outcome, turn.error()
        began, outcome.status = outcome.status == "running", "complete"
        if error is not None and (not began or not isinstance(error, Exception)) and self.stopped is None:
            raise error
        if error is not None:
            outcome.status = "interrupted" if self.stopped is not None else "failed"
            outcome.error = " ".join(str(error).split()) or type(error).__name__
        rank_zero_info(f"{trial.name}: {outcome.status}{f' ({outcome.error})' if outcome.status == 'failed' else ''}")
        self.changed()

    @contextmanager
    def _until_told_to_stop(self) -> Iterator[None]:
        """Within, SIGTERM or Ctrl-C stops each trial after its batch, with a checkpoint. A second Ctrl-C stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            self.stopped = signal.Signals(number)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            rank_zero_info("All trials stop after their batch.")

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
