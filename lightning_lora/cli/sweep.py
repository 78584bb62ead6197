"""``lightning-lora sweep``: several trials of one configuration over one base, side by side where that is exact.

Each trial is what ``fit`` with its options is: the same folder, files and numbers.
"""

from __future__ import annotations

import hashlib
import pydoc
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_lora.cli.console import print_json
from lightning_lora.cli.messages import usage
from lightning_lora.cli.run_rows import RunConfig
from lightning_lora.cli.sweep_report import print_report, report_of
from lightning_lora.cli.sweep_trials import SHORT, take_settings
from lightning_lora.cli.waiting_fit import WaitingFit
from lightning_lora.data.file_data import FileDataModule
from lightning_lora.data.splits import share_of
from lightning_lora.trials.records import Records, check_one_trained, last_checkpoint, mode_of
from lightning_lora.trials.side_by_side import Made, SideBySide, Trial
from lightning_lora.utils.messages import counted

OWN = {"folder": "runs/sweep", "at_once": "8", "side_by_side": "auto", "monitor": "", "mode": ""}  # option of the sweep → default


def sweep(words: Sequence[str], as_json: bool = False) -> None:
    """Run the trials that a command line describes, print their table, and say which is best.

    Args:
        words: the options of the sweep, of the trials and of ``fit``.
        as_json: print JSON.

    Raises:
        ValueError: an option is wrong; nothing was changed. Or a trial was refused when it started.
        RuntimeError: every trial failed.
    """
    own, rest = own_options(words)
    if any(word.partition("=")[0] == "--trainer.default_root_dir" for word in rest):
        raise ValueError(f"--trainer.default_root_dir: a sweep writes into --folder, which is {own['folder']}; name it there")
    described, words = take_settings(rest)
    if not described:
        digests({"": words}, "")  # a misspelt option is the better answer
        raise ValueError("which trials? Give --rank 4,8,16, --learning_rate 1e-4,3e-4, --seed 0,1, or --trials with a YAML list")
    folder = Path(own["folder"])
    without = _without(words) if any("seed" in each.values for each in described) else []
    options = {each.name: [*words, *each.options(without)] for each in described}
    texts = digests(options, own["monitor"])
    with usage(where="--"):
        records = Records(folder, texts)
    monitor, mode = own["monitor"], own["mode"] or mode_of(own["monitor"])
    trials = []
    for each in described:
        trial = Trial(each.name, each.values, lambda: None)  # type: ignore[arg-type, return-value]
        trial.outcome.monitor, trial.outcome.mode = monitor, mode  # type: ignore[assignment]
        trial.outcome.folder = str(folder / each.name)
        if not records.restore(trial.outcome):
            run = _Run(trial, options[each.name], records)
            trial.make = run.make
        trials.append(trial)
    outcomes = [trial.outcome for trial in trials]
    left = [trial for trial in trials if trial.outcome.status != "complete"]
    if len(left) < len(trials):
        rank_zero_info(f"{counted(len(trials) - len(left), 'complete trial')} of {len(trials)} kept.")
    runner = SideBySide(int(own["at_once"]), _choice(own["side_by_side"]), lambda: records.write(outcomes))
    warnings.filterwarnings("ignore", r"(Experiment logs|Checkpoint) directory .* exists")  # a resumed trial's
    with redirect_stdout(sys.stderr):  # tables of Lightning's are no results
        runner.run(left)
    records.write(outcomes)
    report = report_of(records, outcomes)
    print_json(report) if as_json else print_report(report, outcomes)
    check_one_trained(outcomes)


class _TrialConfig(RunConfig):
    """The configuration of a trial."""

    also_known = (*OWN, *SHORT, "trials")


class TrialCLI(WaitingFit):
    """``fit`` that waits to be started, and writes into the trial's folder.

    Args:
        words: the options of ``fit``.
        folder: the trial's folder.
    """

    @override
    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        redirect(self.config["fit"], self.folder)

    def start(self) -> dict[str, Any]:
        """Train. Return the report of ``fit``."""
        self._run("fit", self.arguments)
        return self.results.report(self.trainer, self.model, self.datamodule)


class _Run:
    """Makes the run of a trial."""

    def __init__(self, trial: Trial, words: list[str], records: Records) -> None:
        self.trial, self.words, self.records = trial, words, records
        self.folder = records.folder / trial.name

    def make(self) -> Made:
        """Return trainer and module of the trial, and a function that trains from the start or from the last checkpoint."""
        found = last_checkpoint(self.trial.name, self.folder)
        metrics = self.folder / "metrics.csv"
        if metrics.exists():  # Lightning's logger would remove it
            metrics.rename(next(path for k in range(1, 10**6) if not (path := self.folder / f"metrics-before-{k}.csv").exists()))
        cli = TrialCLI([*self.words, *([f"--ckpt_path={found}"] if found else [])], self.folder)
        return cli.trainer, cli.model, lambda: self._start(cli)

    def _start(self, cli: TrialCLI) -> None:
        self.records.next[self.trial.name] = cli.start()["next"]


def redirect(config: Namespace, folder: Path) -> None:
    """Make a run write into a folder: its loggers, its checkpoint callbacks, its root.

    Raises:
        ValueError: a logger has no folder to set.
    """
    trainer = config.trainer
    trainer.default_root_dir, trainer.enable_progress_bar = str(folder), False
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    for logger in loggers:
        arguments = getattr(logger, "init_args", Namespace())
        if not {"save_dir", "name", "version"} <= vars(arguments).keys():
            raise ValueError(
                f"trainer.logger={getattr(logger, 'class_path', logger)}: a trial's logger has save_dir, name and version, as CSVLogger has"
            )
        arguments.save_dir, arguments.name, arguments.version = str(folder.parent), folder.name, ""
    for callback in trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]:
        arguments = getattr(callback, "init_args", Namespace())
        if getattr(arguments, "dirpath", None):
            arguments.dirpath = str(folder / Path(arguments.dirpath).name)


def own_options(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the options of the sweep itself, and the other words."""
    own, left, queue = dict(OWN), [], list(words)
    while queue:
        word = queue.pop(0)
        option, equals, value = word.partition("=")
        name = option.removeprefix("--")
        if not option.startswith("--") or name not in OWN:
            left.append(word)
            continue
        own[name] = value if equals else queue.pop(0) if queue else ""
        if not own[name] or own[name].startswith("--"):
            raise ValueError(f"--{name}: give a value")
    if not own["at_once"].isdecimal() or own["at_once"] == "0":
        raise ValueError(f"--at_once {own['at_once']}: give how many trials are in memory at most, at least 1")
    _choice(own["side_by_side"])
    if own["mode"] not in ("", "min", "max"):
        raise ValueError(f"--mode {own['mode']}: there are min and max")
    return own, left


def _choice(text: str) -> Any:
    choices: dict[str, Any] = {"auto": "auto", "true": True, "false": False}
    if text.lower() not in choices:
        raise ValueError(f"--side_by_side {text}: there are auto, true and false")
    return choices[text.lower()]


def _without(words: Sequence[str]) -> list[str]:
    """Return the options that a short name must not set: ``data.seed`` where there is none, or where it draws the validation rows."""
    config = _TrialConfig(words).config
    arguments = vars(config.data.get("init_args", Namespace())) if config.get("data") else {}
    drawn = share_of(arguments.get("val")) is not None
    if drawn:
        rank_zero_info("data.val is a share drawn by data.seed, so data.seed is the same in all trials; seeds set seed_everything.")
    return ["data.seed"] if drawn or "seed" not in arguments else []


def check_monitor(config: Namespace, monitor: str) -> None:
    """Refuse a validation metric where there is no validation: the trials would train to the end first.

    Raises:
        ValueError: nothing would log the monitor.
    """
    if not monitor.startswith("val"):
        return
    cls, arguments = pydoc.locate(getattr(config.get("data"), "class_path", None) or ""), config.get("data.init_args", Namespace())
    reason = None
    if config.trainer.limit_val_batches == 0:
        reason = "trainer.limit_val_batches=0"
    elif isinstance(cls, type) and issubclass(cls, FileDataModule) and not arguments.get("val"):
        reason = "data.val is not set"
    if reason:
        raise ValueError(f"--monitor {monitor}: {reason}, so nothing is validated; name a metric of training, or give validation data")


def digests(options: Mapping[str, Sequence[str]], monitor: str) -> dict[str, str]:
    """Return trial → digest of what its run has, once the options of all are known to be right. Nothing is loaded.

    Raises:
        ValueError: an option is wrong, a data file is missing, or nothing would log the monitor.
    """
    run, found = None, dict[str, str]()
    for name, words in options.items():
        run = _TrialConfig(words, run)
        check_monitor(run.config, monitor)
        redirect(run.config, Path("trial"))
        text = run.parser.dump(run.config, skip_none=False, format="json", skip_validation=True)  # it was validated when it was read
        found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found
