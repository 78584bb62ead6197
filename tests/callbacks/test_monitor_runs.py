"""``LoRAMonitor`` in runs that are not the plain one: validations, tied weights, any logger, NaN, ``fast_dev_run``, the other package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, LoRAMonitor
from lightning_lora.callbacks.monitor_hints import hints
from tests.callbacks.test_namespaces import lit
from tests.callbacks.test_namespaces import trainer as trainer_of
from tests.lit import CONFIG, LitNet, trainer


class Validated(LitNet):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch))


def test_losses_of_validations_are_noted_without_the_sanity_check(tmp_path: Path) -> None:
    monitor = LoRAMonitor(report=False)
    trainer(tmp_path, LoRACallback(CONFIG), monitor, max_epochs=2, num_sanity_val_steps=1).fit(Validated())
    assert [step for step, _ in monitor.history.losses] == [4, 8] and all(
        values.keys() == {"loss", "val_loss"} for _, values in monitor.history.losses
    )
    (hint,) = (hint for hint in hints(monitor.findings) if hint.title == "Overfitting")
    assert hint.text.startswith("val_loss ")


class Tied(LitNet):
    """Its head has the embedding's weight, which trains in full."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"embed": nn.Embedding(4, 8), "fc1": nn.Linear(8, 8), "head": nn.Linear(8, 4, bias=False)})
        self.net.head.weight = self.net.embed.weight

    def step(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net.head(self.net.fc1(self.net.embed(batch[1]))), batch[1])


def test_a_tied_weight_that_trains_has_both_names(tmp_path: Path) -> None:
    monitor = LoRAMonitor()
    config = LoRAConfig(rank=2, target_modules=["fc1"], modules_to_save=["embed", "head"])
    trainer(tmp_path, LoRACallback(config), monitor, max_epochs=1).fit(Tied())
    assert monitor.findings.others == ["net.embed.weight", "net.head.weight"] and not monitor.findings.changed_base


class Own(Logger):
    """A logger whose folder is that of all runs, or that has none."""

    name, version = "project", "run7"

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        self.folder, self.seen = folder, []  # type: ignore[var-annotated]

    @property
    def save_dir(self) -> Any:
        return self.folder

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.seen.append(metrics)

    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("own", [True, False], ids=["own folder", "no folder"])
def test_each_run_of_a_logger_has_a_report_of_its_own(tmp_path: Path, own: bool) -> None:
    loggers = [Own(tmp_path / "logs" if own else None), Own(None)]
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    callbacks = [LoRACallback(CONFIG), LoRAMonitor(every_n_steps=2, log_layers=False)]
    L.Trainer(max_epochs=1, accelerator="cpu", logger=loggers, callbacks=callbacks, default_root_dir=tmp_path, **quiet).fit(LitNet())
    assert (tmp_path / ("logs" if own else "") / "project" / "run7" / "lora_monitor" / "report.html").is_file()
    for logger in loggers:
        assert sum("lora/update_ratio" in each for each in logger.seen) == 3


class Spoilt(LitNet):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (torch.nan if batch_idx == 2 else 1)


def test_updates_that_are_nan_are_told_and_keep_their_rank(tmp_path: Path) -> None:
    monitor = LoRAMonitor(every_n_steps=1, apply_ranks_at=4)
    trainer(tmp_path, LoRACallback(CONFIG, allow_nonfinite=True, merge_on_fit_end=False), monitor, max_epochs=2).fit(Spoilt())
    assert any(hint.look and "NaN or infinite" in hint.text for hint in hints(monitor.findings))
    assert monitor.rank_change.step == 4 and not monitor.rank_change.ranks
    assert [row.rank for row in monitor.findings.rows] == [2, 2] and (tmp_path / "lora_monitor" / "report.html").is_file()


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    monitor = LoRAMonitor(apply_ranks_at=1)
    trainer(tmp_path, LoRACallback(CONFIG), monitor, fast_dev_run=2).fit(LitNet())
    assert not list(tmp_path.rglob("*")) and monitor.rank_change.step == 1


def test_an_interval_beyond_the_run_leaves_two_measurements(tmp_path: Path) -> None:
    monitor = LoRAMonitor(every_n_steps=1000)
    trainer(tmp_path, LoRACallback(CONFIG), monitor, max_epochs=1).fit(LitNet())
    assert monitor.history.steps == [0, 4]


@pytest.mark.parametrize("package", [L.pytorch, pytorch_lightning], ids=lambda package: package.__name__)
def test_both_packages(tmp_path: Path, package: Any) -> None:
    monitor = LoRAMonitor(every_n_steps=2, apply_ranks_at=2, energy=0.8)
    logger, config = package.loggers.CSVLogger(tmp_path, name="", version="run"), LoRAConfig(rank=4, target_modules=["fc1", "fc2"])
    trainer_of(package, tmp_path, LoRACallback(config), monitor, logger=logger, log_every_n_steps=1).fit(lit(package))
    assert monitor.history.steps == [0, 2, 4] and monitor.rank_change.ranks
    assert (tmp_path / "run" / "lora_monitor" / "report.html").is_file()
