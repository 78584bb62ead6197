"""The disk: paths that lead elsewhere, folders that cannot be written to, saves that fail half way."""

from __future__ import annotations

import errno
import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, export_merged, load_adapter, save_adapter
from tests.conftest import snapshot
from tests.faults.adapter_files import FILE, JSON, edit_tensors
from tests.faults.kit import CONFIG, IDS, Crash, adapted, case, crash_at, disk_bits, net, refused, row
from tests.lit import CONFIG as FC
from tests.lit import LitNet, trainer
from tests.memory import on_linux, peak


def header(file: Path, length: int, content: bytes) -> None:
    file.write_bytes(struct.pack("<Q", length) + content)


def with_header(entries: dict[str, Any]) -> Any:
    text = json.dumps(entries).encode()
    return lambda folder: header(folder / FILE, len(text), text)


def entry(shape: list[int], end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}


A = "base_model.model.layers.0.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        case(25, "header_longer_than_the_file", lambda f: header(f / FILE, 2**62, b"{}"), (FILE,)),
        case(25, "header_of_gigabytes", lambda f: (header(f / FILE, 2**32, b"{}"), os.truncate(f / FILE, 2**32 + 8)), (FILE,)),
        case(25, "offsets_outside", with_header({A: entry([2, 12], 96)}), (FILE,)),
        case(25, "size_that_overflows", with_header({A: entry([2**62, 4], 96)}), (FILE,)),
        case(25, "many_tensors", with_header({f"base_model.model.x{i}.lora_A.weight": entry([0], 0) for i in range(10**4)}), ("missing",)),
    ],
)
def test_a_header_that_lies(folder: Path, spoil: Any, said: tuple[str, ...]) -> None:
    """Refused without an allocation that goes by the file's word: a header of 2^62 bytes would be one."""
    spoil(folder)
    model, before = net(), {name: path.stat().st_size for name in os.listdir(folder) if (path := folder / name)}
    with refused(str(folder), *said, model=model):
        load_adapter(model, folder)
    assert {name: (folder / name).stat().st_size for name in os.listdir(folder)} == before


@on_linux
@row(25)
def test_a_tensor_of_gigabytes(folder: Path) -> None:
    """In a file that has this size (and holes): known without reading it."""
    size = 2**28
    text = json.dumps({A: entry([2, size // 8], size)}).encode()
    header(folder / FILE, len(text), text)
    os.truncate(folder / FILE, 8 + len(text) + size)
    model = net()
    peak()
    before = peak()
    with refused(FILE, "bytes", "another model", model=model):
        load_adapter(model, folder)
    assert peak() - before < size // 4


@pytest.mark.parametrize(
    "call",
    [
        case(27, "save", lambda path: save_adapter(adapted(), path)),
        case(27, "export", lambda path: export_merged(adapted(), path)),
        case(27, "load", lambda path: load_adapter(net(), path)),
    ],
)
def test_a_path_with_a_nul(tmp_path: Path, call: Any) -> None:
    path = tmp_path / "a\0b"
    with pytest.raises(ValueError, match=r"null byte|no such adapter folder") as caught:
        call(path)
    assert type(caught.value) is ValueError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../../x", "/x", "layers.0/../../x"])
@row(27)
def test_a_name_in_a_file_never_becomes_a_path(tmp_path: Path, folder: Path, name: str) -> None:
    edit_tensors(folder, lambda t: t.update({f"base_model.model.{name}.lora_A.weight": torch.ones(2, 12)}))
    model = net()
    with refused(f"{name}.lora_A", "no tensor", model=model, folder=tmp_path):
        load_adapter(model, folder)


def to_outside(folder: Path) -> Path:
    """Move the folder's tensors out of it and leave a link."""
    outside = folder.parent / "outside.safetensors"
    (folder / FILE).rename(outside)
    (folder / FILE).symlink_to(outside)
    return outside


@row(28)
def test_a_link_is_resolved_on_load(folder: Path) -> None:
    """As hubs' caches lay out their folders."""
    to_outside(folder)
    assert torch.equal(load_adapter(net(), folder)(IDS), adapted()(IDS))


@row(28)
def test_a_link_is_not_followed_on_save(folder: Path) -> None:
    """What it leads to stays as it is; the new file stands in the folder."""
    outside = to_outside(folder)
    before = outside.read_bytes()
    save_adapter(adapted(std=0.2), folder, overwrite=True)
    assert outside.read_bytes() == before
    assert not (folder / FILE).is_symlink()
    assert torch.equal(load_adapter(net(), folder)(IDS), adapted(std=0.2)(IDS))


@row(31)
def test_a_checkpoint_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    """Known before the first step."""
    (tmp_path / "file").touch()
    model = LitNet()
    with refused(str(tmp_path / "file" / "checkpoints"), folder=tmp_path):
        trainer(tmp_path, LoRACallback(FC), ModelCheckpoint(tmp_path / "file" / "checkpoints"), max_epochs=1).fit(model)
    assert not model.losses


@row(31)
def test_an_adapter_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    model = adapted()
    with refused(str(tmp_path / "file"), "is a file", model=model, folder=tmp_path):
        save_adapter(model, tmp_path / "file")
    before, disk = snapshot(model), disk_bits(tmp_path)
    with pytest.raises((ValueError, OSError), match="file"):
        save_adapter(model, tmp_path / "file" / "adapter")
    assert (snapshot(model), disk_bits(tmp_path)) == (before, disk)


FULL = OSError(errno.ENOSPC, "No space left on device")


def run(folder: Path, epochs: int, ckpt: Path | None = None) -> LitNet:
    torch.manual_seed(0)
    model = LitNet()
    keep = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    trainer(folder, LoRACallback(FC, merge_on_fit_end=False), keep, max_epochs=epochs).fit(model, ckpt_path=ckpt)
    return model


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")
@pytest.mark.parametrize("step", [1, 2])
@row(32)
def test_a_disk_that_fills_in_a_checkpoint(tmp_path: Path, step: int) -> None:
    """The old checkpoint is there to the byte, nothing is beside it, and the run resumes from it step by step."""
    run(tmp_path, 1)
    before = disk_bits(tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
        crash_at(patch, step, FULL)
        run(tmp_path, 2)
    assert disk_bits(tmp_path) == before
    assert run(tmp_path / "rest", 2, tmp_path / "last.ckpt").losses == run(tmp_path / "whole", 2).losses[4:]


def whole_adapter(folder: Path) -> tuple[Any, ...] | None:
    """What a reader finds that goes by both files, to the byte of each tensor; None if one is missing."""
    if sorted(os.listdir(folder)) != [JSON, FILE]:
        return None
    with safe_open(folder / FILE, "pt") as file:
        meta = file.metadata()
    return json.loads((folder / JSON).read_text()), meta, {name: t.tolist() for name, t in load_file(folder / FILE).items()}


@pytest.mark.parametrize("error", [case(32, "full_disk", FULL), case(34, "kill", Crash())])
def test_an_adapter_folder_is_never_mixed(tmp_path: Path, error: BaseException) -> None:
    """Whoever reads it by both files finds one whole adapter, the old or the new, at any moment."""
    models = [adapted(), adapted(LoRAConfig(rank=4, alpha=8, target_modules=["q_proj"]))]
    old, new = (whole_adapter(save_adapter(model, tmp_path / str(i))) for i, model in enumerate(models))
    assert old != new and old is not None and new is not None
    for step in range(1, 20):
        folder = save_adapter(models[0], tmp_path / f"step{step}")
        with pytest.MonkeyPatch.context() as patch:
            count = crash_at(patch, step, error)
            try:
                save_adapter(models[1], folder, overwrite=True)
            except type(error):
                assert whole_adapter(folder) in (old, new), f"call {step} failed"
            else:
                assert whole_adapter(folder) == new
    assert count[0] < step


@row(33)
def test_staging_is_beside_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename is atomic on one filesystem only, and `$TMPDIR` is often another: here it is none at all."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    run(tmp_path / "run", 1)
    save_adapter(adapted(), tmp_path / "adapter")
    assert sorted(disk_bits(tmp_path)) == ["adapter", f"adapter/{JSON}", f"adapter/{FILE}", "run", "run/last.ckpt"]


@pytest.mark.parametrize("write", [save_adapter, export_merged])
@row(59)
def test_a_folder_that_is_not_empty(tmp_path: Path, write: Any) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    model = adapted()
    with refused(str(tmp_path), "is not empty", "overwrite=True", model=model, folder=tmp_path):
        write(model, tmp_path)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@row(60)
def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    """The second leaves the first one's checkpoint as it was."""

    def one() -> dict[str, bytes | None]:
        trainer(tmp_path, LoRACallback(FC), ModelCheckpoint(tmp_path, filename="c"), max_epochs=1).fit(LitNet())
        return disk_bits(tmp_path)

    first, both = one(), one()
    assert len(both) == 2 and both.items() > first.items()
    model = apply_lora(net(), config=CONFIG)
    save_adapter(model, tmp_path / "adapter")
    with refused("is not empty", model=model, folder=tmp_path):
        save_adapter(model, tmp_path / "adapter")
