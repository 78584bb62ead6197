"""Before the first step, not at the first save: checkpoints that cannot be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback
from lightning_lora.storage.file_locks import exclusive
from lightning_lora.strategies.savable import least_bytes
from tests.conftest import snapshot
from tests.lit import CONFIG, LitNet, trainer


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    def fallocate(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)


def test_no_room(tmp_path: Path, full: None) -> None:
    module = LitNet()
    before = snapshot(module)["bits"], module.losses
    with pytest.raises(ValueError, match=r"dirpath='.*ck' has no room for .* MB, as much as one checkpoint of this run takes at least"):
        trainer(tmp_path, LoRACallback(CONFIG), ModelCheckpoint(tmp_path / "ck", every_n_epochs=3), max_epochs=3).fit(module)
    assert (snapshot(module)["bits"], module.losses) == before == (before[0], [])
    assert not (tmp_path / "ck").exists()


def test_a_run_that_saves_nothing_is_not_checked(tmp_path: Path, full: None) -> None:
    trainer(tmp_path, LoRACallback(CONFIG), max_epochs=1).fit(LitNet())
    trainer(tmp_path, LoRACallback(CONFIG), ModelCheckpoint(tmp_path / "ck"), fast_dev_run=True).fit(LitNet())


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "ck").touch()
    with pytest.raises(ValueError, match=r"dirpath='.*ck': .*ck is no folder"):
        trainer(tmp_path, LoRACallback(CONFIG), ModelCheckpoint(tmp_path / "ck"), max_epochs=1).fit(LitNet())


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_checkpoint_that_was_set_aside_is_put_back(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.old").mkdir(parents=True)
    (tmp_path / ".other.ckpt.old").touch()
    (tmp_path / "other.ckpt").touch()
    with pytest.warns(UserWarning, match=r"last\.ckpt had been renamed by a save that was killed"):
        trainer(tmp_path, LoRACallback(CONFIG), ModelCheckpoint(tmp_path), max_epochs=1).fit(LitNet())
    assert (tmp_path / "last.ckpt").is_dir() and (tmp_path / ".other.ckpt.old").exists()


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_locks_of_killed_processes_go_and_a_held_one_stays(tmp_path: Path) -> None:
    """A run that was killed in its last save writes nothing when it resumes, so no save removes the lock file."""
    held, left, others = (tmp_path / name for name in (".held.ckpt.lock", ".left.ckpt.lock", ".mine.lock"))
    for file in (left, others):
        file.touch()
    with exclusive(held):
        trainer(tmp_path, LoRACallback(CONFIG), ModelCheckpoint(tmp_path, save_top_k=0), max_epochs=1).fit(LitNet())
        assert held.exists() and others.exists() and not left.exists()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("weights_only", [False, True])
def test_the_least_is_below_what_is_written_and_near_it(tmp_path: Path, optimizer: type[torch.optim.Optimizer], weights_only: bool) -> None:
    class Lit(LitNet):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
            return optimizer([p for p in self.parameters() if p.requires_grad], lr=0.1, **options)  # type: ignore[arg-type]

    saver = ModelCheckpoint(tmp_path, filename="x", save_weights_only=weights_only)
    run, module = trainer(tmp_path, LoRACallback(CONFIG, merge_on_fit_end=False), saver, max_epochs=1), Lit()
    run.fit(module)
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    tensors = [t for state in saved.get("optimizer_states", []) for entry in state["state"].values() for t in entry.values()]
    exact = sum(t.nbytes for t in [*saved["state_dict"].values(), *filter(torch.is_tensor, tensors)])
    least = least_bytes(module, [] if weights_only else run.optimizers)
    assert 0 < least <= exact
    if optimizer is not torch.optim.Adagrad:  # whose one moment is not counted
        assert least >= 0.98 * exact
