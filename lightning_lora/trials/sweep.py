"""``sweep``: trials from Python. The caller's own code makes each run, so that it is what it would be alone."""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_lora.strategies.namespaces import twins
from lightning_lora.trials.naming import name_trials, text_of
from lightning_lora.trials.one_run import Mode, Outcome
from lightning_lora.trials.records import Records, best_of, check_one_trained, last_checkpoint, mode_of, table, warn_of_unlogged
from lightning_lora.trials.side_by_side import Made, SideBySide, Trial

Make = Callable[[dict[str, Any], Path | None], tuple[Trainer, LightningModule, Mapping[str, Any]]]


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has found. Printed, it is a table.

    Attributes:
        outcomes: how each trial stands: ``name``, ``settings``, ``best``, ``best_step``, ``steps``, ``last``, ``status``, ``error``,
            ``folder``.
        reason: why the trials ran one after another; None if they trained side by side.
    """

    outcomes: list[Outcome]
    reason: str | None

    @property
    def best(self) -> Outcome | None:
        """The complete trial with the best value; None if no complete trial has the value."""
        return best_of(self.outcomes)

    def __str__(self) -> str:
        header, rows = table(self.outcomes)
        cells = [header, *([f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def sweep(
    make: Make,
    trials: Sequence[Mapping[str, Any]],
    *,
    folder: str | Path | None = None,
    at_once: int = 8,
    side_by_side: bool | Literal["auto"] = "auto",
    monitor: str | None = None,
    mode: Mode | None = None,
) -> SweepResult:
    """Train several adapters over one base in memory, side by side where that is exact.

    Each trial is what ``trainer.fit(module, **arguments)`` is alone, but that it leaves its adapter unmerged. ``make`` runs once a trial
    and makes all of it anew: Trainer with one ``LoRACallback``, module, loaders. All begin with the random numbers of the time of the
    call, unless ``make`` seeds. Frozen parameters that are equal are shared after that.

    One forward and one backward pass serves all trials if the LightningModule has the methods ``training_loss``, ``join`` and
    ``losses_by_owner``, as this package's tasks do, and if each trial's first loss, gradients and random numbers are those that it computes
    alone. Elsewhere they run one after another, and the log says why.

    Args:
        make: called with a trial's settings, without ``name``, and its folder; returns Trainer, LightningModule and the arguments
            of ``fit``.
        trials: the settings of each: numbers, strings, None, and lists and dicts of them. ``name`` names a trial.
        folder: gets ``sweep.json``, ``sweep.csv`` and a folder for each trial, in which its Trainer must write. The same call again keeps
            complete trials and resumes others from their newest checkpoint there; settings are compared, ``make`` is not. None: nothing is
            written, and nothing resumes.
        at_once: trials in memory at most.
        side_by_side: one pass for all: "auto", where it is exact; True, or an error; False, never.
        monitor: the logged value that trials are compared by, noted after each validation and at the end. None: what a checkpoint or an
            early stop looks at, or ``val_loss``, or without validation ``train_loss``.
        mode: "min" or "max". None: "max" for names that end in accuracy, f1, bleu, rouge1, rouge2, rougeL or margin.

    Returns:
        How each trial stands. One that fails after its first batch has the status "failed", and the others go on.

    Raises:
        ValueError: an argument is wrong, or the folder is another sweep's: nothing was run. Or ``make`` returned something wrong, the run
            cannot be a trial, or ``side_by_side=True`` is not exact: all have stopped. What ``make`` and ``fit`` raise before the
            first batch comes through as it is.
        RuntimeError: every trial failed.

    Examples:
        >>> def make(settings, folder):
        ...     L.seed_everything(settings.get("seed", 0))
        ...     callback = LoRACallback(LoRAConfig(rank=settings["rank"]))
        ...     trainer = L.Trainer(max_epochs=1, callbacks=[callback], default_root_dir=folder, enable_progress_bar=False)
        ...     return trainer, MyModule(), {"train_dataloaders": DataLoader(batches, batch_size=None)}
        >>> found = sweep(make, [{"rank": 4}, {"rank": 8, "name": "larger"}], folder="runs/sweep")
        >>> [outcome.status for outcome in found.outcomes]
        ['complete', 'complete']
    """
    if not callable(make):
        raise ValueError(f"make={make!r} must be a function of a trial's settings and its folder.")
    if not isinstance(side_by_side, bool) and side_by_side != "auto":
        raise ValueError(f"side_by_side={side_by_side!r} must be 'auto', True or False.")
    if mode not in (None, "min", "max"):
        raise ValueError(f"mode={mode!r} must be 'min' or 'max'.")
    if mode is not None and not monitor:
        raise ValueError(f"mode={mode!r} is said of no value; name it with monitor=.")
    described = [_text(number, each) for number, each in enumerate(_listed(trials))]
    named, apart = name_trials(trials), _Apart()
    runner = SideBySide(at_once, side_by_side)
    records = None if folder is None else Records(Path(folder), {name: text for (name, _), text in zip(named, described, strict=True)})
    runs = [_trial(name, settings, make, None if folder is None else Path(folder) / name, apart) for name, settings in named]
    outcomes = [run.outcome for run in runs]
    for outcome in outcomes:
        if monitor:
            outcome.monitor, outcome.mode = monitor, mode or mode_of(monitor)
    if records is not None:
        runs = [run for run in runs if not records.restore(run.outcome)]
        runner.changed = lambda: records.write(outcomes)
    with warnings.catch_warnings():
        if records is not None:  # a resumed trial's
            warnings.filterwarnings("ignore", r"(Experiment logs|Checkpoint) directory .* exists")
        runner.run(runs)
    runner.changed()
    check_one_trained(outcomes)
    warn_of_unlogged(monitor, outcomes)
    return SweepResult(outcomes, runner.reason)


def _listed(trials: Any) -> Sequence[Mapping[str, Any]]:
    """Return the trials' settings.

    Raises:
        ValueError: they are no list of mappings, or there are none.
    """
    if not isinstance(trials, Sequence) or isinstance(trials, str) or not trials:
        raise ValueError(f"trials={trials!r} must be a list of settings, such as [{{'rank': 4}}, {{'rank': 16}}].")
    for number, each in enumerate(trials):
        if not isinstance(each, Mapping) or not each or not all(isinstance(key, str) for key in each):
            raise ValueError(f"trials[{number}]={each!r} must be a mapping with names, such as {{'rank': 4}}.")
    return trials


def _text(number: int, settings: Mapping[str, Any]) -> str:
    """Return settings as text, by which a folder's trials are known again."""
    for key, value in settings.items():
        try:
            text_of(value)
        except yaml.YAMLError as error:
            raise ValueError(
                f"trials[{number}][{key!r}]={value!r} is of type {type(value).__name__}; give a number, a string, a list or dict of them,"
                " and make the rest of it in make."
            ) from error
    return text_of(dict(settings))


def _trial(name: str, settings: dict[str, Any], make: Make, folder: Path | None, apart: _Apart) -> Trial:
    def made() -> Made:
        found = make(copy.deepcopy(settings), folder)
        given = found if isinstance(found, tuple) else (found,)
        wanted: list[tuple[type, ...]] = [twins(Trainer), twins(LightningModule), (Mapping,)]
        if len(given) != 3 or not all(isinstance(each, cls) for each, cls in zip(given, wanted, strict=True)):
            types = ", ".join(type(each).__name__ for each in given)
            raise ValueError(f"{name}: make returned {types}; return a Trainer, a LightningModule and a dict, the arguments of fit.")
        trainer, module, arguments = found
        known = inspect.signature(trainer.fit).parameters.keys() - {"model"}
        if unknown := sorted(arguments.keys() - known):
            raise ValueError(f"{name}: {unknown[0]!r} is no argument of fit; there are {', '.join(sorted(known))}.")
        apart.add(name, trainer, module, arguments)
        checkpoint = None
        if folder is not None:
            _check_folder(name, trainer, folder)
            checkpoint = last_checkpoint(name, folder)
        options = dict(arguments) | ({} if checkpoint is None else {"ckpt_path": checkpoint})
        return trainer, module, lambda: trainer.fit(module, **options)

    trial = Trial(name, settings, made)
    trial.outcome.folder = "" if folder is None else str(folder)
    return trial


def _check_folder(name: str, trainer: Trainer, folder: Path) -> None:
    """Raise ValueError if a trial's checkpoints would be outside its folder, where nothing would resume from them."""
    places = {"Trainer(default_root_dir)": trainer.default_root_dir}
    if trainer.loggers and trainer.loggers[0].save_dir is not None:  # Lightning's place of checkpoints without a dirpath
        places[f"{type(trainer.loggers[0]).__name__}(save_dir)"] = str(trainer.loggers[0].save_dir)
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "dirpath", None) is not None:
            places[f"{type(callback).__name__}(dirpath)"] = str(callback.dirpath)  # type: ignore[attr-defined]
    for what, place in places.items():
        if not Path(place).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{name}: {what} is {place}, and the trial's folder is {folder}; give it the folder that make is called with.")


class _Apart:
    """Knows the objects of every trial. Two trials with one of them would not be what each is alone."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Callable[[], Any], str]] = {}

    def add(self, name: str, trainer: Trainer, module: LightningModule, arguments: Mapping[str, Any]) -> None:
        """Add a trial's objects.

        Raises:
            ValueError: another trial has one of them.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        parts = [("Trainer", trainer), *((type(each).__name__, each) for each in (*callbacks, *trainer.loggers))]
        parts += [(f"module {path}" if path else type(module).__name__, each) for path, each in module.named_modules()]
        parts += [(argument, each) for argument, value in arguments.items() for each in _loaders(value)]
        for what, each in parts:
            known, owner = self._known.get(id(each), (lambda: None, ""))
            if known() is each:
                raise ValueError(f"{name}: {what} is an object of the trial {owner!r} too; make one for each trial, in make.")
        self._known |= {id(each): (_reference(each), name) for _, each in parts}


def _reference(value: Any) -> Callable[[], Any]:
    """Return a function that returns the object, without keeping it in memory if its class allows that."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def _loaders(value: Any) -> Iterator[Any]:
    """Yield what has a place in the data, or random numbers, in an argument of ``fit``: not rows that are read by their number."""
    if isinstance(value, (Mapping, list, tuple)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _loaders(each)
    elif isinstance(value, twins(LightningDataModule)) or (isinstance(value, Iterable) and not hasattr(value, "__getitem__")):
        yield value
