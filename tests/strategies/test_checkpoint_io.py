"""What ``fit(ckpt_path=...)`` reads: files and folders of strangers run no code, and every mistake is one line."""

from __future__ import annotations

import logging
import os
import pathlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_lora import LoRACallback, load_adapter, save_adapter
from lightning_lora.cli.commands import inspect
from lightning_lora.storage.read_shards import INDEX
from lightning_lora.strategies.checkpoint_io import REST, DurableCheckpointIO, read, write_folder
from tests.conftest import snapshot
from tests.lit import CONFIG, LitNet, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Be aware that when using `ckpt_path`")


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and the adapter folder of the same run."""
    folder = tmp_path_factory.mktemp("trained")
    run, module = trainer(folder, LoRACallback(CONFIG, merge_on_fit_end=False), max_epochs=1), LitNet()
    run.fit(module)
    run.save_checkpoint(folder / "c.ckpt")
    save_adapter(module, folder / "adapter")
    return folder


def shards(path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("warnings.warn", lambda *args, **kwargs: None)  # torch's, of a save on one process
    write_folder(content, path)
    monkeypatch.undo()
    return path


def resume(folder: Path, path: Path | str, **kwargs: Any) -> LitNet:
    module = LitNet()
    plugins = kwargs.pop("plugins", None)
    trainer(folder, LoRACallback(CONFIG, merge_on_fit_end=False), max_epochs=2, plugins=plugins).fit(module, ckpt_path=str(path), **kwargs)
    return module


def test_an_adapter_is_loaded_from_a_folder_of_shards(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from a file: ``load_adapter`` and ``inspect``, under any name."""
    content = torch.load(trained / "c.ckpt", weights_only=True)
    folder = shards(tmp_path / "folder", content, monkeypatch)
    of_file, of_folder = LitNet(), LitNet()
    load_adapter(of_file, trained / "c.ckpt")
    load_adapter(of_folder, folder)
    assert snapshot(of_folder)["bits"] == snapshot(of_file)["bits"]
    inspect(str(folder))
    inspect(str(trained / "c.ckpt"))
    first, second = capsys.readouterr().out.split("adapter ")[1:]
    assert first.splitlines()[1:] == second.splitlines()[1:] and "fc1.lora_A" in first

    (folder / "__0_0.distcp").unlink()
    fresh = LitNet()
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=r"folder is not a readable checkpoint: .* \(its tensors have [\d,]+ bytes, its files [\d,]+\)"):
        load_adapter(fresh, folder)
    assert snapshot(fresh) == before


def test_a_large_folder_of_shards_is_not_read(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path / "folder", torch.load(trained / "c.ckpt", weights_only=True), monkeypatch)
    with open(folder / "more", "wb") as file:
        file.truncate(2**27)
    with pytest.raises(ValueError, match=r"folder has [\d,]+ bytes; an adapter of this Net has at most"):
        load_adapter(LitNet(), folder)


def test_a_folder_of_shards_holds_what_a_file_does(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = torch.load(trained / "c.ckpt", weights_only=True)
    path = shards(tmp_path / "s.ckpt", content, monkeypatch)
    again = read(DurableCheckpointIO(), path)
    assert again.keys() == content.keys() and again["loops"] == content["loops"]
    assert all(torch.equal(again["state_dict"][name], tensor) for name, tensor in content["state_dict"].items())
    one, two = resume(tmp_path, path), resume(tmp_path, trained / "c.ckpt")
    assert one.losses == two.losses and len(one.losses) == 4


@pytest.mark.parametrize("weights_only", [None, True, False])
@pytest.mark.parametrize("where", ["index", "rest"])
def test_a_folder_of_shards_runs_no_code(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, weights_only: bool | None
) -> None:
    path = shards(tmp_path / "s.ckpt", torch.load(trained / "c.ckpt", weights_only=True), monkeypatch)
    if where == "index":
        (path / INDEX).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    else:
        torch.save({"x": Evil(tmp_path / "ran")}, path / REST)
    with pytest.raises(ValueError, match=r"is not a readable checkpoint|meta\.pt has no place for \d+ tensors?"):
        resume(tmp_path, path, weights_only=weights_only)
    assert (tmp_path / "ran").exists() == (where == "rest" and weights_only is False)  # asked for


@pytest.mark.parametrize("plugin", [None, AsyncCheckpointIO])
def test_a_file_runs_no_code(trained: Path, tmp_path: Path, plugin: Any) -> None:
    torch.save({**torch.load(trained / "c.ckpt", weights_only=True), "x": Evil(tmp_path / "ran")}, tmp_path / "e.ckpt")
    for path, error in ((tmp_path / "e.ckpt", (ValueError, pickle.UnpicklingError)), ("http://127.0.0.1:9/e.ckpt", ValueError)):
        with pytest.raises(error):
            resume(tmp_path, path, plugins=None if plugin is None else [plugin()])
    assert not (tmp_path / "ran").exists()


def test_a_trusted_file_is_read_when_asked_for_and_that_is_said(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = {**torch.load(trained / "c.ckpt", weights_only=True), "folder": pathlib.PurePosixPath("data")}
    torch.save(own, tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match="pass weights_only=False to fit"):
        resume(tmp_path, tmp_path / "own.ckpt")
    with caplog.at_level(logging.INFO):
        module = resume(tmp_path, tmp_path / "own.ckpt", weights_only=False)
    assert len(module.losses) == 4 and "own.ckpt is read with weights_only=False, as you asked" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter", r"adapter is no checkpoint\. An adapter folder is loaded by load_adapter\(model, folder\), before fit"),
        ("adapter/adapter_model.safetensors", "is no checkpoint"),
        ("nowhere.ckpt", r"Checkpoint file not found: .*nowhere\.ckpt\.$"),
        ("list.ckpt", r"list\.ckpt was not written under LoRACallback: it holds a list"),
        ("model.pt", r"model\.pt is not a readable checkpoint: it holds .*torch\.nn\.modules"),
        ("cut.ckpt", r"cut\.ckpt is not a readable checkpoint: it was not written by torch\.save, or it is damaged"),
    ],
)
def test_a_mistake_is_one_line(trained: Path, tmp_path: Path, name: str, message: str) -> None:
    torch.save([1], trained / "list.ckpt")
    torch.save(torch.nn.Linear(2, 2), trained / "model.pt")
    data = (trained / "c.ckpt").read_bytes()
    (trained / "cut.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=message) as caught:
        resume(tmp_path, trained / name)
    assert "\n" not in str(caught.value)
