"""Control what a run writes beside its results: its folder and config once it has begun, its progress bar on stderr."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from typing_extensions import override

from lightning_lora.cli.yaml_files import as_yaml, read_yaml

WRITTEN_AT_START = {"hparams.yaml", "metrics.csv", "config.yaml"}


class StderrProgressBar(TQDMProgressBar):
    """Lightning's bars, on stderr: stdout is for results. Its default, the Rich bar, prints nothing if the output is a file."""

    @override
    def init_sanity_tqdm(self) -> Tqdm:
        with redirect_stdout(sys.stderr):
            return super().init_sanity_tqdm()

    @override
    def init_train_tqdm(self) -> Tqdm:
        with redirect_stdout(sys.stderr):
            return super().init_train_tqdm()

    @override
    def init_validation_tqdm(self) -> Tqdm:
        with redirect_stdout(sys.stderr):
            return super().init_validation_tqdm()

    @override
    def init_test_tqdm(self) -> Tqdm:
        with redirect_stdout(sys.stderr):
            return super().init_test_tqdm()

    @override
    def init_predict_tqdm(self) -> Tqdm:
        with redirect_stdout(sys.stderr):
            return super().init_predict_tqdm()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the line of the progress bar."""
        if self.is_enabled:
            sys.stderr.write("\n")


class BeganConfig(SaveConfigCallback):
    """Lightning's ``SaveConfigCallback``, but it writes once the run has begun. So a run that is refused leaves no file.

    Without a logger there is no folder of this run alone: a file that is there is kept, and the new one's name gets a number. Commands that
    do not train write nothing then. In the folder of a logger that has one for all runs, ``config.yaml`` is the last run's, as checkpoints
    and metrics are; the earlier one becomes ``config-before.yaml``. (Lightning's refuses such a run.) The logger gets the configuration
    too, as the hyperparameter ``config``.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **options)  # `save_config` writes the file too

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        text = as_yaml(self.parser, self.config)
        files = get_filesystem(self.folder)
        files.makedirs(self.folder, exist_ok=True)
        with files.open(os.path.join(self.folder, self.config_filename), "w", encoding="utf-8") as file:
            file.write(text)
        for logger in trainer.loggers:
            logger.log_hyperparams({"config": read_yaml(text)})

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet."""

    def begin(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write, on the first rank."""
        self.folder = str(trainer.log_dir)  # a collective
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name, folder = Path(self.config_filename), Path(str(trainer.log_dir))
        if not trainer.loggers:
            self.config_filename = trainer.strategy.broadcast(free(folder / name.stem, name.suffix).name)
        elif trainer.is_global_zero and (folder / name).exists():
            (folder / name).rename(free(folder / f"{name.stem}-before", name.suffix))
        self.begin(trainer, pl_module, "fit")

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.loggers and not trainer.sanity_checking:
            self.begin(trainer, pl_module, "validate")

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.loggers:
            self.begin(trainer, pl_module, "test")

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.loggers:
            self.begin(trainer, pl_module, "predict")


def free(path: Path, ending: str = "") -> Path:
    """Return the path with an ending, or the first numbered one that does not exist: ``adapter``, ``adapter-v1``."""
    numbers = chain([""], (f"-v{number}" for number in count(1)))
    return next(each for each in (path.with_name(f"{path.name}{number}{ending}") for number in numbers) if not each.exists())


@contextmanager
def no_folder_of_a_failed_start(trainer: Trainer) -> Iterator[None]:
    """Remove the run's folder if the run fails with nothing in it. Loggers create it before data, adapter and checkpoint are checked."""
    run = trainer.log_dir if trainer.loggers else None  # a collective where processes are connected already
    folder = Path(run) if trainer.is_global_zero and run else None
    there = folder is None or folder.exists()
    made = [path for path in ([] if there or folder is None else folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        if folder is not None and not there and folder.is_dir():
            files = list(folder.iterdir())
            if all(file.name in WRITTEN_AT_START and (file.name != "metrics.csv" or not file.stat().st_size) for file in files):
                shutil.rmtree(folder)
                with suppress(OSError):  # a parent folder holds another run's folder
                    for path in made:
                        path.rmdir()
        raise
