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
from lightning_lora.data.resuming import Position, ResumableLoader
from tests import tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:You passed in a `val_dataloader`")


class Watch(L.LightningModule):
    """Notes the rows of every batch, or the documents of packed ones, by their lengths, which all differ."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = tiny_lm.tokenizer()
        self.linear = nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if "attention_mask" in batch:
            lengths = batch["attention_mask"].sum(1)
        else:
            bounds, ids = batch["cu_seq_lens_q"], batch["input_ids"].flatten()
            begins, lengths = bounds[:-1], bounds.diff()
            lengths = lengths[(lengths > 0) & (ids[begins.clamp(max=len(ids) - 1)] != self.tokenizer.pad_token_id)]
        self.seen.append(lengths.tolist())
        return self.linear(torch.ones(1, 1)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(file: str, folder: str, ckpt: str | None = None, size: int = 4, **packing: Any) -> list[list[int]]:
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
    trainer.fit(module, InstructionDataModule(file, batch_size=size, **packing), ckpt_path=ckpt)
    return module.seen


def write_rows(folder: Path, count: int = 24) -> str:
    return tiny_lm.write(folder / "train.jsonl", [{"prompt": "sky " * (i + 1), "response": "blue"} for i in range(count)])


def rows(batches: list[list[int]]) -> list[int]:
    return sorted(chain.from_iterable(batches))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows"))


PACKED = {"packing": True, "max_length": 40}  # the 24 rows in twelve packed ones


@pytest.mark.parametrize(("size", "options"), [(4, {}), (2, PACKED)], ids=["padded", "packed"])
def test_it_goes_on_with_the_next_rows(size: int, options: dict[str, Any], file: str, tmp_path: Path) -> None:
    """From every step, the ends of epochs included."""
    whole = fit(file, str(tmp_path / "whole"), None, size, **options)
    assert len(whole) == 12 and rows(whole[:6]) == rows(whole[6:]) == list(range(8, 32)) and whole[:6] != whole[6:]
    for step in (1, 3, 5, 6, 7, 11):
        assert fit(file, str(tmp_path / f"from{step}"), str(tmp_path / f"whole/step={step}.ckpt"), size, **options) == whole[step:], step


def test_what_was_resumed_can_be_resumed(file: str, tmp_path: Path) -> None:
    whole = fit(file, str(tmp_path / "whole"))
    fit(file, str(tmp_path / "again"), str(tmp_path / "whole/step=2.ckpt"))
    assert fit(file, str(tmp_path / "third"), str(tmp_path / "again/step=4.ckpt")) == whole[4:]


def loader(position: Position, rows: int = 24, size: int = 4) -> ResumableLoader:
    return ResumableLoader(list(range(rows)), position, batch_size=size)


def test_it_begins_behind_what_was_given_out() -> None:
    first = loader(Position())
    batches = iter(first)
    assert [next(batches)[0] for _ in range(3)] == [0, 4, 8]
    state = first.state_dict()
    assert state == {"rows": 12}

    resumed = loader(Position())
    assert resumed.resumed_at is None
    resumed.load_state_dict(state)
    assert resumed.resumed_at == 3
    batches = iter(resumed)
    assert next(batches)[0] == 12 and resumed.state_dict() == {"rows": 16}  # counted from the epoch's beginning
    assert [batch[0] for batch in batches] == [16, 20]
    assert resumed.state_dict() == {"rows": 0} and resumed.resumed_at is None  # the epoch is over: nothing to skip in the next
    assert [batch[0] for batch in resumed] == [0, 4, 8, 12, 16, 20]


@pytest.mark.parametrize(("size", "first"), [(3, 12), (6, 12), (8, 8), (24, 0)])
def test_another_size_of_batch_begins_behind_the_same_rows(size: int, first: int) -> None:
    """As on another number of processes. The last two begin inside a batch, whose first rows come again."""
    resumed = loader(Position(), size=size)
    resumed.load_state_dict({"rows": 12})
    assert next(iter(resumed))[0] == first


def test_configure_optimizers_that_asks_for_the_number_of_steps(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes the loader before the checkpoint is loaded."""

    def configure(module: Watch) -> Any:
        assert module.trainer.estimated_stepping_batches == 12
        return torch.optim.SGD(module.parameters(), lr=0.1)

    monkeypatch.setattr(Watch, "configure_optimizers", configure)
    whole = fit(file, str(tmp_path / "whole"))
    assert fit(file, str(tmp_path / "rest"), str(tmp_path / "whole/step=9.ckpt")) == whole[9:]
