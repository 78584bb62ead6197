"""``DurableCheckpointIO`` for any Trainer; folders of shards that are replaced, removed and found. Kills: tests/harness."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_lora import DurableCheckpointIO, LoRACallback
from lightning_lora.storage import folders
from lightning_lora.strategies.checkpoint_io import REST, found, read_folder, write_folder
from tests.lit import CONFIG, LitNet, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed"
)


def shards(path: Path, value: float) -> Path:
    """A folder of shards in a single process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of DCP: no process group
        write_folder({"state_dict": {"x": torch.full((3,), value)}, "step": value}, path)
    return path


def value_of(path: Path) -> float:
    saved = read_folder(path) if path.is_dir() else torch.load(path, weights_only=True)
    assert saved["state_dict"]["x"].eq(saved["step"]).all()
    return float(saved["step"])


@pytest.mark.parametrize(
    ("make", "kept"), [(DurableCheckpointIO, 1), (lambda: AsyncCheckpointIO(DurableCheckpointIO()), -1)], ids=["plain", "async"]
)
def test_any_trainer_can_have_it(tmp_path: Path, make: Any, kept: int) -> None:
    """Without LoRA: the same content as Lightning's own, the same files kept and removed, and a resume that goes on from there.

    Lightning's asynchronous IO removes a file at once, and perhaps before it is written. So there all are kept.
    """

    def fit(folder: Path, plugins: list[Any], epochs: int = 2, **kwargs: Any) -> LitNet:
        saver = ModelCheckpoint(folder, filename="{epoch}", monitor="loss", save_top_k=kept, save_last=True)
        module = LitNet()
        torch.manual_seed(0)
        trainer(folder, saver, max_epochs=epochs, plugins=plugins).fit(module, **kwargs)
        return module

    fit(tmp_path / "own", [])
    fit(tmp_path / "durable", [make()])
    names = sorted(os.listdir(tmp_path / "own"))
    assert sorted(os.listdir(tmp_path / "durable")) == names and "last.ckpt" in names and len(names) == (2 if kept == 1 else 3)
    for name in names:
        own, durable = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("own", "durable"))
        assert own.keys() == durable.keys() and own["global_step"] == durable["global_step"]
        assert all(torch.equal(tensor, durable["state_dict"][key]) for key, tensor in own["state_dict"].items())
    resumed = fit(tmp_path / "again", [make()], epochs=3, ckpt_path=str(tmp_path / "durable" / "last.ckpt"))
    whole = fit(tmp_path / "whole", [], epochs=3)
    assert resumed.losses == whole.losses[-len(resumed.losses) :] and len(resumed.losses) == len(whole.losses) // 3


def test_a_storage_is_left_to_lightning() -> None:
    io, path = DurableCheckpointIO(), "memory://folder/x.ckpt"
    io.save_checkpoint({"step": 1}, path)
    assert io.load_checkpoint(path) == {"step": 1} and found(path) == path
    io.remove_checkpoint(path)
    assert not folders.standing(Path("folder")).exists()
    with pytest.raises(ValueError, match="not found: memory:"):
        io.load_checkpoint(path)


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("first", ["file", "folder", "set aside"])
@pytest.mark.parametrize("then", ["file", "folder"])
def test_a_checkpoint_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool, first: str, then: str
) -> None:
    if not exchanges:
        monkeypatch.setattr(folders, "exchange", lambda *args: False)
    io, path = DurableCheckpointIO(), tmp_path / "last.ckpt"
    for kind, value in ((first, 1.0), (then, 2.0)):
        if kind == "file":
            io.save_checkpoint({"state_dict": {"x": torch.full((3,), value)}, "step": value}, path)
        else:
            shards(path, value)
        if kind == "set aside":
            path.rename(folders.aside(path))
        assert value_of(Path(found(str(path)))) == value
    assert os.listdir(tmp_path) == ["last.ckpt"]
    io.remove_checkpoint(path)
    assert os.listdir(tmp_path) == [] and found(str(path)) == str(path)


@pytest.mark.parametrize("then", ["file", "folder"])
def test_a_full_disk_keeps_the_folder_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    path = shards(tmp_path / "last.ckpt", 1.0)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_lora.strategies.checkpoint_io.write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        shards(path, 2.0) if then == "folder" else DurableCheckpointIO().save_checkpoint({"step": 2}, path)
    monkeypatch.undo()
    assert value_of(path) == 1.0
    shards(path, 3.0)
    assert value_of(path) == 3.0 and os.listdir(tmp_path) == ["last.ckpt"]


def test_a_users_folder_of_that_name_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    (path / "notes").mkdir(parents=True)
    with pytest.raises(OSError):
        DurableCheckpointIO().save_checkpoint({"step": 1}, path)
    assert os.listdir(tmp_path) == ["last.ckpt"] and os.listdir(path) == ["notes"]


def test_a_removal_that_is_cut_short_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shards(tmp_path / "old.ckpt", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(folders.shutil, "rmtree", lambda path, **kwargs: os.unlink(Path(path) / ".metadata"))
        DurableCheckpointIO().remove_checkpoint(path)
    assert not path.exists() and found(str(path)) == str(path)
    assert not any((folder / REST).exists() and folder.name[0] != "." for folder in tmp_path.iterdir())
    DurableCheckpointIO().remove_checkpoint(tmp_path / "another.ckpt")
    assert os.listdir(tmp_path) == []


def test_a_resume_finds_what_was_set_aside(tmp_path: Path) -> None:
    run, module = trainer(tmp_path, LoRACallback(CONFIG, merge_on_fit_end=False), max_epochs=1), LitNet()
    run.fit(module)
    path = tmp_path / "last.ckpt"
    run.save_checkpoint(path)
    path.rename(folders.aside(path))
    again = LitNet()
    trainer(tmp_path, LoRACallback(CONFIG, merge_on_fit_end=False), max_epochs=2).fit(again, ckpt_path=str(path))
    assert len(again.losses) == len(module.losses)


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError, r"No space left on device \(rank 0\): .*last\.ckpt"),
        (KeyError("torn"), RuntimeError, r"last\.ckpt.*: rank 0 could not write its shards: KeyError: 'torn'"),
    ],
)
def test_a_shard_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type, said: str) -> None:
    """One line, where DCP's own text is a traceback per rank. The old folder stays, and nothing is beside it."""
    path = shards(tmp_path / "last.ckpt", 1)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fails)
        with pytest.raises(kind, match=said) as caught:
            shards(path, 2)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["last.ckpt"] and value_of(path) == 1
