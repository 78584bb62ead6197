"""A folder is replaced whole, only if it is a model's; what a killed run left is taken away."""

import errno
import os
from pathlib import Path

import pytest

from lightning_lora.cli.output_folder import replaced_folder, weight_bytes
from tests.processes import ended, start


def fill(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in (files or {"config.json": "old", "model.safetensors": "old"}).items():
        (folder / name).write_text(text)
    return folder


def write(out: Path, overwrite: bool = False, keep: tuple[str, ...] = ()) -> None:
    with replaced_folder(str(out), overwrite, keep) as folder:
        fill(folder, **{"config.json": "new"})


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"config.json": "", "notes.txt": ""}, "holds 'notes.txt'"),
        ({"config.json": "", "results.json": ""}, "holds 'results.json'"),
        ({"model.safetensors": ""}, "has no config.json"),
    ],
)
def test_overwrite_replaces_models_only(tmp_path, files, named):
    out = fill(tmp_path / "out", **files)
    with pytest.raises(ValueError, match=f"{named}: --overwrite replaces a model"):
        write(out, overwrite=True)
    assert {file.name for file in out.iterdir()} == files.keys() and os.listdir(tmp_path) == ["out"]


def test_a_folder_in_a_models_folder_is_not_the_models(tmp_path):
    (fill(tmp_path / "out") / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds 'checkpoints'"):
        write(tmp_path / "out", overwrite=True)


def test_a_models_folder_is_replaced_when_asked(tmp_path):
    out = fill(tmp_path / "out")
    with pytest.raises(ValueError, match="is not empty; name another folder, or pass --overwrite"):
        write(out)
    write(out, overwrite=True)
    assert [(file.name, file.read_text()) for file in out.iterdir()] == [("config.json", "new")]
    assert os.listdir(tmp_path) == ["out"]


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="disk"), replaced_folder(str(tmp_path / "a" / "b"), False, ()):
        raise RuntimeError("disk full")
    assert not os.listdir(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for out in ("file/x", "/proc/none"):
        with pytest.raises(ValueError, match=r"^out='.*'( cannot be written to: |: .*file is no folder; choose another)"):
            write(tmp_path / out)
    with pytest.raises(ValueError, match=r"^out='' is empty"), replaced_folder("", False, ()):
        pass


def is_killed(out):
    with replaced_folder(str(out), True, ()) as folder:
        (folder / "config.json").write_text("killed")
        os._exit(9)


def test_a_killed_run_costs_nothing(tmp_path):
    """tests/storage/test_folder_commit.py has kills at the other moments."""
    out = fill(tmp_path / "out")
    assert ended(start(is_killed, out)) == 9
    assert len(os.listdir(tmp_path)) > 1  # what it staged
    write(out, overwrite=True)
    assert (out / "config.json").read_text() == "new" and os.listdir(tmp_path) == ["out"]


def test_no_room_is_known_before_the_work(tmp_path, monkeypatch):
    """The old model stays until the new one is whole, so there must be room beside it."""
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    out = fill(tmp_path / "out")
    message = r"^out='.*' has no room for 1\.0 MB, as much as the new model takes at least"
    with pytest.raises(ValueError, match=message), replaced_folder(str(out), True, (), room=10**6):
        raise AssertionError("the work has begun")
    assert (out / "config.json").read_text() == "old" and os.listdir(tmp_path) == ["out"]


def no_room(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_size_of_a_models_weights(tmp_path):
    fill(tmp_path, **{"model-1.safetensors": "abcd", "model-2.safetensors": "ef", "pytorch_model.bin": "a" * 5, "some.gguf": "abc"})
    assert weight_bytes(str(tmp_path), None, "auto") == weight_bytes(str(tmp_path), None, "float32") == 6
    assert weight_bytes(str(tmp_path), None, "bfloat16") == 3
    assert weight_bytes(str(tmp_path), "some.gguf", "auto") == 3
    assert weight_bytes("some/hub-id", None, "auto") == 0
