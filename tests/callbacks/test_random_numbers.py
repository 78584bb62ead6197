"""A resumed run draws what the run that was not stopped drew: dropout, Python's and NumPy's numbers, the order of the next epoch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.callbacks.random_numbers import KEY
from tests.callbacks.lora_runs import Resumable
from tests.lit import LitNet, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint", "ignore:The dirpath has changed")
CONFIG = LoRAConfig(rank=2, target_modules=["fc1", "fc2"], dropout=0.3)


class Drawing(LitNet):
    """Four batches an epoch; notes what every step draws."""

    def __init__(self, shuffle: bool) -> None:
        super().__init__()
        self.shuffle, self.drawn = shuffle, []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.drawn.append((batch[2].tolist(), loss.item(), torch.rand(1).item(), random.random(), np.random.rand()))
        return loss

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(3)
        data = TensorDataset(torch.randn(16, 8, generator=generator), torch.zeros(16, dtype=torch.long), torch.arange(16))
        return DataLoader(data, batch_size=4, shuffle=True) if self.shuffle else Resumable(data, batch_size=4)


def fit(folder: Path, seed: int, shuffle: bool, ckpt: Path | None = None) -> list[Any]:
    torch.manual_seed(5)
    module = Drawing(shuffle)
    for draws in (torch.manual_seed, random.seed, np.random.seed):
        draws(seed)
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(folder, LoRACallback(CONFIG, merge_on_fit_end=False), keep, max_epochs=3).fit(module, ckpt_path=ckpt)
    return module.drawn


@pytest.mark.parametrize(("step", "shuffle"), [(2, False), (6, False), (4, True), (8, True)])
def test_a_resumed_run_draws_the_same(tmp_path: Path, step: int, shuffle: bool) -> None:
    whole = fit(tmp_path, 1, shuffle)
    rest = fit(tmp_path / "rest", 2, shuffle, tmp_path / f"step={step}.ckpt")
    assert rest == whole[step:]


def test_a_checkpoint_that_is_written_after_the_fit(tmp_path: Path) -> None:
    """What was drawn since, as by a test, does not count."""

    def run(epochs: int, ckpt: Path | None = None) -> tuple[Any, Any]:
        torch.manual_seed(5)
        module, fits = Drawing(True), trainer(tmp_path, LoRACallback(CONFIG, merge_on_fit_end=False), max_epochs=epochs)
        for draws in (torch.manual_seed, random.seed, np.random.seed):
            draws(1 if ckpt is None else 2)
        fits.fit(module, ckpt_path=ckpt)
        return module.drawn, fits

    (whole, _), (_, first) = run(3), run(2)
    torch.rand(3)
    first.save_checkpoint(tmp_path / "a.ckpt")
    assert run(3, tmp_path / "a.ckpt")[0] == whole[8:]
    first.save_checkpoint(tmp_path / "b.ckpt", weights_only=True)
    assert KEY not in torch.load(tmp_path / "b.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda states: "x", "is no list of states"),
        (lambda states: [{**states[0], "torch": torch.zeros(3)}], r"are damaged \(TypeError"),
        (lambda states: [{**states[0], "python": [3, [1], None]}], r"are damaged \(ValueError"),
        (lambda states: [{**states[0], "numpy": ["MT19937", [-1], 0, 0, 0.0]}], r"are damaged \((OverflowError|ValueError)"),
        (lambda states: [{}], r"are damaged \(KeyError"),
    ],
)
def test_damaged_states_are_one_line(tmp_path: Path, change: Any, message: str) -> None:
    fit(tmp_path, 1, False)
    file = tmp_path / "step=4.ckpt"
    content = torch.load(file, weights_only=True)
    content[KEY] = change(content[KEY])
    torch.save(content, file)
    with pytest.raises(ValueError, match=message) as error:
        fit(tmp_path / "rest", 2, False, file)
    assert "\n" not in str(error.value) and "resume from another checkpoint" in str(error.value)


def test_another_number_of_processes_draws_anew_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, 1, False)
    file = tmp_path / "step=2.ckpt"
    content = torch.load(file, weights_only=True)
    content[KEY] *= 2
    torch.save(content, file)
    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(tmp_path / "rest", 2, False, file)
    assert "Random numbers are drawn anew: the checkpoint has those of 2 processes, this run has 1." in caplog.text
