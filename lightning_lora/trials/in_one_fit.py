"""``LoRACallback(sweep=Trials([...]))``: several adapters trained side by side by one ``Trainer.fit``, over one base in memory.

For the time of the run :class:`JointModule` takes the place of the user's module; each trial's ``LoRACallback`` and this file's callback
take that of the user's. So Lightning runs one loop, with one set of loaders, checkpoints and loggers. Everything else is a trial's own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.adapter_io.save_load import save_adapter
from lightning_lora.callbacks import LoRACallback
from lightning_lora.callbacks.companions import add_companions
from lightning_lora.callbacks.sweep_option import Sweep
from lightning_lora.model.modes import restore_flags
from lightning_lora.strategies.namespaces import twins
from lightning_lora.trials.joint_module import JointModule
from lightning_lora.trials.joint_optimizer import configure_jointly
from lightning_lora.trials.joint_refusals import check_run
from lightning_lora.trials.live_trial import LiveTrial, key_of
from lightning_lora.trials.one_run import Mode
from lightning_lora.trials.own_settings import OwnSettings, check_trials, read_settings
from lightning_lora.trials.records import Records, check_one_trained, mode_of, warn_of_unlogged
from lightning_lora.trials.shared_copy import not_shared, own_what_trains, shared_copy
from lightning_lora.trials.sweep import SweepResult
from lightning_lora.utils.names import join


class Trials(Sweep):
    """The trials of ``LoRACallback(sweep=...)``: one ``fit`` trains an adapter for each, on the same batches, over one base in memory.

    Each trial is what the same ``fit`` with its settings alone is: adapter, optimizer state, schedulers, clipping, dropout, metrics,
    early stop and folder are its own. For every batch the steps of the trials follow each other, so that it costs what separate
    fits cost, without their loading. A trial that stops early, or whose loss or gradients are not finite, costs nothing more; ``fit``
    ends when all have stopped. What a module logs gets the trial's name: ``small/val_loss``. ``EarlyStopping`` in the Trainer works
    for each trial, with the plain name.

    Loaders draw the run's random numbers. With a ``generator`` of their own, a trial's dropout is that of a separate fit.

    ``fit`` leaves the module as it was, without an adapter. Checkpoints hold all trials, and a run resumes from them exactly.

    Args:
        trials: the settings of each: fields of ``LoRAConfig``, over the callback's; ``learning_rate`` and ``weight_decay``, which the
            module's ``configure_optimizers`` reads from ``self``, or takes for all groups; ``lora_plus_ratio``; ``precondition``;
            ``seed``, for random numbers as after ``seed_everything``. ``name`` names a trial.
        folder: gets ``sweep.csv``, ``sweep.json``, and for each trial its adapter in ``NAME/best`` and ``NAME/last``. None: nothing is
            written.
        monitor: the logged value that trials are compared by, noted after each validation, or each epoch without one. None: what an early
            stop looks at, or ``val_loss``, or without validation ``train_loss``.
        mode: "min" or "max". None: "max" for names that end in accuracy, f1, bleu, rouge1, rouge2, rougeL or margin.

    Attributes:
        result: how each trial stands; set when ``fit`` ends. Printed, it is a table.
        modules: trial → its module, with its adapter.

    Raises:
        ValueError: an argument is wrong. Or, when ``fit`` starts, the run cannot train several: several devices, manual optimization,
            AdaLoRA, an init that reads data, a compiled or quantizing callback and others; the function :func:`~lightning_lora.sweep` can.

    Examples:
        >>> trials = Trials([{"rank": 2}, {"rank": 4, "learning_rate": 1e-3, "name": "larger"}])
        >>> callback = LoRACallback(LoRAConfig(dropout=0.1), sweep=trials)
        >>> L.Trainer(max_epochs=1, callbacks=[callback]).fit(MyModule())
        >>> [outcome.status for outcome in trials.result.outcomes]
        ['complete', 'complete']
    """

    def __init__(
        self,
        trials: Sequence[Mapping[str, Any]],
        *,
        folder: str | Path | None = None,
        monitor: str | None = None,
        mode: Mode | None = None,
    ) -> None:
        self.trials = check_trials(trials)
        if mode not in (None, "min", "max"):
            raise ValueError(f"mode={mode!r} must be 'min' or 'max'.")
        if mode is not None and not monitor:
            raise ValueError(f"mode={mode!r} is said of no value; name it with monitor=.")
        self.folder, self.monitor, self.mode = None if folder is None else str(folder), monitor, mode
        self.result: SweepResult | None = None
        self.modules: dict[str, LightningModule] = {}

    def __repr__(self) -> str:
        return f"Trials({self.trials!r}, folder={self.folder!r}, monitor={self.monitor!r}, mode={self.mode!r})"

    def begin(self, callback: LoRACallback, trainer: Trainer, module: LightningModule) -> None:
        """Take over from a ``LoRACallback`` for the time of the run."""
        settings = read_settings(self.trials, callback)
        check_run(callback, trainer, module, settings)
        records = None if self.folder is None else Records(Path(self.folder), {each.name: each.text for each in settings})
        _Run(self, callback, trainer, module, settings, records).take_over()


class _Run(Callback):
    """The callback of one run. It takes the place of the user's ``LoRACallback``."""

    def __init__(
        self,
        options: Trials,
        callback: LoRACallback,
        trainer: Trainer,
        module: LightningModule,
        settings: Sequence[OwnSettings],
        records: Records | None,
    ) -> None:
        self.options, self.callback, self.trainer, self.original, self.records = options, callback, trainer, module, records
        self.callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        stops: list[Any] = [each for each in self.callbacks if isinstance(each, twins(EarlyStopping))]
        self.trials = [LiveTrial(each, _own_callback(callback, each), stops, trainer) for each in settings]
        monitor, mode = options.monitor, options.mode
        if monitor is None and stops:
            monitor, mode = stops[0].monitor, stops[0].mode
        monitor = monitor or ("val_loss" if trainer.enable_validation else "train_loss")
        for trial in self.trials:
            trial.outcome.compare_by(monitor, mode or mode_of(monitor))
        self.flags = [(p, p.requires_grad) for p in module.parameters()]
        self.late = not self.flags
        self.replaced: dict[Callback, Callback] = {self: callback}  # by what → the user's

    def take_over(self) -> None:
        """Put the joint module and this callback in the place of the user's."""
        self.callbacks[self.callbacks.index(self.callback)] = self
        for k, each in enumerate(self.callbacks):  # Lightning is iterating over this list, so it keeps its length
            if isinstance(each, twins(EarlyStopping)):
                self.callbacks[k] = Callback()
                self.replaced[self.callbacks[k]] = each
        add_companions(self.trainer, temporary=True, tune_loop=self.callback.tune_loop)
        self.callbacks.append(_GiveBack(self))
        self.joint = JointModule(self.original, self.trials, self._build, lambda: configure_jointly(self.trials), self._epoch_end)
        self._connect(self.joint)

    def _connect(self, module: LightningModule) -> None:
        self.trainer.strategy.connect(module)
        module.trainer = self.trainer
        for callback in self.callbacks:
            callback.log, callback.log_dict = module.log, module.log_dict  # type: ignore[attr-defined]

    def _build(self) -> None:
        """Make each trial's module and adapt it. What trains in it is its own after that, all else the base's."""
        self.flags = [(p, p.requires_grad) for p in self.original.parameters()]
        place = self.callbacks.index(self) + 1
        for number, trial in enumerate(self.trials):
            if self.late:
                trial.begin()  # after the draws that have built the model
            restore_flags(self.flags)
            self.joint.adopt(trial, shared_copy(self.original))
            self.callbacks.insert(place + number, trial.callback)
            try:
                with trial.drawing():
                    trial.callback.setup(self.trainer, self.joint, "fit")
            except ValueError as error:
                raise ValueError(f"trial {trial.name!r}: {error}") from error
            own_what_trains(trial.module, self.original)
            if apart := [name for name in not_shared(trial.module, self.original) if "lora_" not in name.rpartition(".")[2]]:
                raise ValueError(f"sweep: {apart[0]!r} of {trial.name!r} is frozen and not the base's; use the function sweep for it.")
            for stop in trial.stops:
                stop.setup(trial.view, trial.module, "fit")  # type: ignore[arg-type]
        self.options.modules = {trial.name: trial.module for trial in self.trials}

    # The run.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the trials run."""
        for trial in self.trials:
            if trial.live:
                trial.outcome.status = "running"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the values, and stop the trials that do not get better."""
        if not trainer.sanity_checking:
            self._after("on_validation_end", note=True)

    def _epoch_end(self) -> None:
        self._after("on_train_epoch_end", note=not self.trainer.enable_validation)

    def _after(self, hook: str, note: bool) -> None:
        for trial in [trial for trial in self.trials if trial.live]:
            if note:
                self._note(trial)
            for stop in trial.stops:
                getattr(stop, hook)(trial.view, trial.module)
            if trial.view.should_stop:
                trial.stop("complete")
                self._save(trial, "last")
        if not any(trial.live for trial in self.trials):
            self.trainer.should_stop = True
        self._write()

    def _note(self, trial: LiveTrial) -> None:
        best = trial.outcome.best
        trial.outcome.note(trial.view)  # type: ignore[arg-type]
        if trial.outcome.best != best:
            self._save(trial, "best")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what each trial has become, and print the table."""
        for trial in self.trials:
            if trial.live:
                self._note(trial)
                trial.outcome.status = "complete"
            if trial.outcome.status == "complete":
                self._save(trial, "last")
        self._write()
        warn_of_unlogged(self.options.monitor, [trial.outcome for trial in self.trials])
        self.options.result = SweepResult([trial.outcome for trial in self.trials], None)
        rank_zero_info(f"\n{self.options.result}")
        check_one_trained(self.options.result.outcomes)

    def _save(self, trial: LiveTrial, which: str) -> None:
        if self.options.folder is not None:
            trial.outcome.folder = str(Path(self.options.folder) / trial.name)
            save_adapter(trial.module.get_submodule(self.callback.module or ""), Path(trial.outcome.folder) / which, overwrite=True)

    def _write(self) -> None:
        if self.records is not None:
            self.records.write([trial.outcome for trial in self.trials])

    # Checkpoints.

    @property
    def state_key(self) -> str:
        return "LoRACallback.sweep"

    def state_dict(self) -> dict[str, Any]:
        """Return each trial's random numbers, early stops and outcome, by its name."""
        return {trial.name: {"settings": trial.settings.text, **trial.state()} for trial in self.trials}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the checkpoint is another sweep's.
        """
        for trial in self.trials:
            saved = state_dict.get(trial.name)
            if saved is None or saved["settings"] != trial.settings.text:
                raise ValueError(
                    f"{self.trainer.ckpt_path} holds another sweep: its trial {trial.name!r} has other settings; use the same"
                    f" trials to resume it, or leave ckpt_path out."
                )
            trial.load(saved)

    def give_back(self) -> None:
        """Give the Trainer the user's module and callbacks again, and the module its flags."""
        hooks = getattr(self.trainer.strategy, "_lora_hooks", None)
        if hooks is not None and hooks.module is self.joint:
            hooks.remove()
        self._connect(self.original)
        self.joint.release()
        restore_flags(self.flags)
        mine = [trial.callback for trial in self.trials]
        left = [each for each in self.trainer.callbacks if each not in mine and not isinstance(each, _GiveBack)]  # type: ignore[attr-defined]
        self.trainer.callbacks = [self.replaced.get(each, each) for each in left]  # type: ignore[attr-defined]


class _GiveBack(Callback):
    """Ends a run. It is the last callback, since others save a checkpoint when a run is interrupted."""

    def __init__(self, run: _Run) -> None:
        self.run = run

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.run.give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.run.give_back()


def _own_callback(callback: LoRACallback, settings: OwnSettings) -> LoRACallback:
    """Return the callback of one trial: the user's, with the trial's settings, for its copy of the module."""
    own = copy.copy(callback)
    own.sweep = None
    own = copy.deepcopy(own)
    own.config, own.merge_on_fit_end = settings.config, False
    own.module = join(key_of(settings.name), callback.module or "")
    for name, value in settings.options.items():
        setattr(own, name, value)
    return own
