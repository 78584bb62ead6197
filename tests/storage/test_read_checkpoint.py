"""Files of strangers: no way of reading one runs the code in it."""

from __future__ import annotations

import os
import pathlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora.storage.read_checkpoint import located, read_checkpoint


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_tensors_and_plain_values_come_in(tmp_path: Path) -> None:
    content = {"a": torch.arange(3), "b": [1, 2.5, None, "x"]}
    torch.save(content, tmp_path / "x.ckpt")
    for path in (tmp_path / "x.ckpt", f"file://{tmp_path / 'x.ckpt'}"):
        read = read_checkpoint(path)
        assert torch.equal(read["a"], content["a"]) and read["b"] == content["b"]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("weights_only", [None, True])
def test_code_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights_only: bool | None, zipped: bool) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # which is for calls that do not say
    torch.save({"x": Evil(tmp_path / "ran")}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"x\.ckpt is not a readable checkpoint") as caught:
        read_checkpoint(tmp_path / "x.ckpt", weights_only)
    assert not (tmp_path / "ran").exists() and "\n" not in str(caught.value)


def test_a_bare_pickle_does_not_run_either(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        read_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_trusted_file_loads_by_either_way_that_the_message_names(tmp_path: Path) -> None:
    file, content = tmp_path / "x.ckpt", {"folder": pathlib.PurePosixPath("data")}
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"safe_globals\(\[pathlib\S*PurePosixPath\]\), or pass weights_only=False"):
        read_checkpoint(file)
    assert read_checkpoint(file, weights_only=False) == content
    with torch.serialization.safe_globals([pathlib.PurePosixPath]):
        assert read_checkpoint(file) == content


@pytest.mark.parametrize(
    "path",
    [
        "http://127.0.0.1:9/x.ckpt",
        "HTTPS://host/x.ckpt",
        "ftp://host/x",
        "hf://some/model/x.ckpt",
        "simplecache::s3://bucket/x",
        "file::http://h/x",
    ],
)
@pytest.mark.parametrize("weights_only", [None, True, False])
def test_a_url_is_refused(path: str, weights_only: bool | None) -> None:
    with pytest.raises(ValueError, match=r"is a URL, and no checkpoint is read from there: download it"):
        read_checkpoint(path, weights_only)


def test_a_storage_is_read_without_code_only() -> None:
    assert located("s3://bucket/last.ckpt", None) == ("s3://bucket/last.ckpt", True)
    with pytest.raises(ValueError, match=r"weights_only=False lets s3://bucket/last\.ckpt run any code"):
        located("s3://bucket/last.ckpt", False)
    assert located("runs/last.ckpt", False) == ("runs/last.ckpt", False)


def test_damage_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    torch.save({"a": torch.randn(40)}, file)
    whole = file.read_bytes()
    for cut in range(0, len(whole), 97):
        file.write_bytes(whole[:cut])
        with pytest.raises(
            ValueError,
            match=r"x\.ckpt is not a readable checkpoint: (the file is empty|it was not written by torch\.save, or it is damaged \(.)",
        ) as caught:
            read_checkpoint(file)
        assert "\n" not in str(caught.value)
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match="Checkpoint file not found: "):
            read_checkpoint(path)
