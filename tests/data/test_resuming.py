"""A run that resumes inside an epoch: every row comes once, in the order of the run that was not interrupted."""

from __future__ import annotations

import logging
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.data import InstructionDataModule
from lightning_lora.data.resuming import ResumableBatches, ResumableLoader
from tests import tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:You passed in a `val_dataloader`")


class Watch(L.LightningModule):
    """Notes the rows of every batch, by their lengths, which all differ."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = tiny_lm.tokenizer()
        self.linear = nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["attention_mask"].sum(1).tolist())
        return self.linear(torch.ones(1, 1)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(file: str, folder: str, ckpt: str | None = None, size: int = 4) -> list[list[int]]:
    torch.manual_seed(0)
    module, several = Watch(), dist.is_initialized()
    if several:  # a worker's: quiet
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    strategy: Any = DDPStrategy(process_group_backend="gloo") if several else "auto"
    lora = LoRACallback(LoRAConfig(rank=1, target_modules=["linear"]), merge_on_fit_end=False)
    devices = dist.get_world_size() if several else 1
    trainer = L.Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_epochs=2, callbacks=[lora, keep], **quiet)
    trainer.fit(module, InstructionDataModule(file, batch_size=size), ckpt_path=ckpt)
    return module.seen


def write_rows(folder: Path, count: int = 24) -> str:
    return tiny_lm.write(folder / "train.jsonl", [{"prompt": "sky " * (i + 1), "response": "blue"} for i in range(count)])


def rows(batches: list[list[int]]) -> list[int]:
    return sorted(chain.from_iterable(batches))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows"))


def test_it_goes_on_with_the_next_rows(file: str, tmp_path: Path) -> None:
    """From every step, the ends of epochs included."""
    whole = fit(file, str(tmp_path / "whole"))
    assert len(whole) == 12 and rows(whole[:6]) == rows(whole[6:]) and whole[:6] != whole[6:]
    for step in (1, 3, 5, 6, 7, 11):
        assert fit(file, str(tmp_path / f"from{step}"), str(tmp_path / f"whole/step={step}.ckpt")) == whole[step:], step


def test_what_was_resumed_can_be_resumed(file: str, tmp_path: Path) -> None:
    whole = fit(file, str(tmp_path / "whole"))
    fit(file, str(tmp_path / "again"), str(tmp_path / "whole/step=2.ckpt"))
    assert fit(file, str(tmp_path / "third"), str(tmp_path / "again/step=4.ckpt")) == whole[4:]


def test_another_batch_size_goes_on_after_the_same_rows() -> None:
    """The order of this data module goes by the batch size; the loader's position counts rows."""
    loader = ResumableLoader(list(range(24)), batch_sampler=ResumableBatches(range(24), 4, drop_last=False))  # type: ignore[arg-type]
    for batch in loader:
        if batch[0] == 8:
            break
    assert loader.state_dict() == {"rows": 12}
    for size, first in ((3, 12), (6, 12), (8, 8), (24, 0)):  # the last two begin inside a batch: its first rows come again
        other = ResumableLoader(list(range(24)), batch_sampler=ResumableBatches(range(24), size, drop_last=False))  # type: ignore[arg-type]
        other.load_state_dict({"rows": 12})
        assert next(iter(other))[0] == first
        assert next(iter(other))[0] == 0, "the epoch after it is whole"
