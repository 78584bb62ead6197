"""Resuming inside an epoch: the log says what comes again, where the position of the loader is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback
from tests.callbacks.lora_runs import Resumable
from tests.lit import CONFIG, LitNet, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint", "ignore:The dirpath has changed", "ignore:You defined a `validation_step`"
)


class Rows(LitNet):
    """Eight batches an epoch; notes each batch by its first row."""

    def __init__(self, loader: type[DataLoader] = DataLoader) -> None:
        super().__init__()
        self.loader, self.seen = loader, []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(int(batch[2][0]) // 4)
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(3)
        data = TensorDataset(torch.randn(32, 8, generator=generator), torch.zeros(32, dtype=torch.long), torch.arange(32))
        return self.loader(data, batch_size=4)

    val_dataloader = None


def fit(folder: Path, module: Rows, ckpt: Path | None = None, **kwargs: Any) -> Rows:
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(folder, LoRACallback(CONFIG), keep, max_epochs=2, **kwargs).fit(module, ckpt_path=ckpt)
    return module


def test_an_ordinary_loader_starts_over_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, Rows())
    with caplog.at_level("INFO"):
        module = fit(tmp_path / "rest", Rows(), tmp_path / "step=11.ckpt")
    assert module.seen == [0, 1, 2, 3, 4]
    assert "Resumed inside epoch 1, after 3 batches of it. The position of DataLoader was not saved" in caplog.text
    assert "its first 5 batches come in this epoch, its last 3 do not" in caplog.text and "StatefulDataLoader" in caplog.text


def test_a_checkpoint_without_the_position_of_a_loader_that_has_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, Rows())
    with caplog.at_level("INFO"):
        module = fit(tmp_path / "rest", Rows(Resumable), tmp_path / "step=3.ckpt")
    assert module.seen[:5] == [0, 1, 2, 3, 4] and "The position of Resumable was not saved" in caplog.text


@pytest.mark.parametrize(("loader", "step"), [(Resumable, 3), (DataLoader, 8)], ids=["position kept", "end of the epoch"])
def test_what_goes_on_with_the_next_rows_is_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture, loader: Any, step: int) -> None:
    whole = fit(tmp_path, Rows(loader))
    with caplog.at_level("INFO"):
        rest = fit(tmp_path / "rest", Rows(loader), tmp_path / f"step={step}.ckpt")
    assert rest.seen == whole.seen[step:] and "Resumed inside" not in caplog.text


class Early(Rows):
    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 16
        return super().configure_optimizers()


def test_a_position_that_lightning_does_not_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The loader was made before, for the number of steps."""
    fit(tmp_path, Early(Resumable))
    with caplog.at_level("INFO"):
        module = fit(tmp_path / "rest", Early(Resumable), tmp_path / "step=3.ckpt")
    assert module.seen[:5] == [0, 1, 2, 3, 4] and "The position of Resumable was not saved or not loaded" in caplog.text


def test_a_fresh_run_is_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(tmp_path, Rows(), limit_train_batches=2)
    assert "Resumed inside" not in caplog.text
