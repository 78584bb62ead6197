"""Checkpoints that are larger in memory than on disk, and damaged ones that torch reads all the same."""

from __future__ import annotations

import codecs
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora.storage.read_checkpoint import read_checkpoint
from lightning_lora.storage.stored_size import SMALL, check_tensors

CONTENT = {"state_dict": {"x": torch.arange(64.0)}, "epoch": 1, "pair": (1, [torch.zeros(3)])}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save(CONTENT, tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


def rewrite(file: Path, **options: Any) -> None:
    """Write the archive's records anew."""
    with zipfile.ZipFile(file) as old:
        records = {record.filename: old.read(record) for record in old.infolist()}
    with zipfile.ZipFile(file, "w", **options) as new:
        for name, data in records.items():
            new.writestr(name, data)


def test_any_changed_bit_of_a_tensor_is_found(file: Path) -> None:
    data = bytearray(file.read_bytes())
    place = data.find(CONTENT["state_dict"]["x"].numpy().tobytes())  # type: ignore[index]
    data[place + 9] ^= 4
    file.write_bytes(data)
    assert not torch.equal(torch.load(file, weights_only=True)["state_dict"]["x"], torch.arange(64.0)), "torch does not look"
    with pytest.raises(ValueError, match=r"x\.ckpt is not a readable checkpoint: .*CRC-32"):
        read_checkpoint(file)


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(CONTENT, tmp_path / "x.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_checkpoint(tmp_path / "x.ckpt")["state_dict"]["x"], torch.arange(64.0))


def test_a_file_of_the_older_format_is_read(tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "x.ckpt")["state_dict"]["x"], torch.arange(64.0))


def test_compressed_records_are_refused_before_they_are_read(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    torch.save(torch.zeros(2**20), file)
    rewrite(file, compression=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 2**14, "a bomb"
    with pytest.raises(ValueError, match=r"stand for more: torch\.save writes no compressed records"):
        read_checkpoint(file)
    torch.save(torch.zeros(2**10), file)
    rewrite(file)
    assert read_checkpoint(file).shape == (2**10,)


REPEATED: list[Callable[[torch.Tensor], Any]] = [
    lambda t: t.expand(2**15, 2**12),
    lambda t: {"a": [t.expand(2**28)]},
    lambda t: (t.to(torch.uint8).expand(2**40),),
    lambda t: torch.nn.Parameter(t.expand(2**16, 2**10)),
]


@pytest.mark.parametrize("make", REPEATED)
def test_a_tensor_that_repeats_what_is_stored(tmp_path: Path, make: Callable[[torch.Tensor], Any]) -> None:
    torch.save({"state_dict": make(torch.zeros(1))}, tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").stat().st_size < 10**4
    with pytest.raises(ValueError, match=r"x\.ckpt is not a readable checkpoint: .*a tensor of shape \(.*\) has [\d,]+ bytes, the file"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_what_is_as_large_as_the_file_or_small_is_taken() -> None:
    check_tensors({"x": torch.zeros(1).expand(SMALL // 4), "y": torch.empty(SMALL, device="meta").expand(9, -1)}, 10)
    check_tensors([torch.zeros(1).expand(SMALL)], 4 * SMALL)
    with pytest.raises(ValueError):
        check_tensors([torch.zeros(1).expand(SMALL)], 4 * SMALL - 1)


class Call:
    """Is a call of a function, once it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.called


def nested(times: int, wrap: Callable[[Any], Any], inner: Any) -> Any:
    for _ in range(times):
        inner = wrap(inner)
    return inner


BOMBS = {
    "bytearray": (Call(bytearray, 2**33), r"calls builtins\.bytearray\(int\)"),
    "bytearray of a tensor": (Call(bytearray, torch.tensor(2**33)), r"calls builtins\.bytearray\(Tensor\)"),
    "hexadecimal": (nested(33, lambda inner: Call(codecs.encode, inner, "hex"), b"x"), r"calls _codecs\.encode\(bytes, str\)"),
    "lists": (nested(40, lambda inner: [inner, inner], 1), "more entries than its .* bytes"),
    "dicts": (nested(40, lambda inner: {"a": inner, "b": inner}, 1), "more entries than its .* bytes"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_makes_a_large_object(tmp_path: Path, name: str, zipped: bool) -> None:
    content, said = BOMBS[name]
    torch.save({"state_dict": content}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    assert (tmp_path / "x.ckpt").stat().st_size < 10**4
    with pytest.raises(ValueError, match=rf"x\.ckpt is not a readable checkpoint: .*{said}"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_bytes_come_in_as_they_were(tmp_path: Path) -> None:
    content = {"bytes": bytes(range(256)), "array": bytearray(range(256)), "empty": bytearray(), "same": [[1] * 9] * 9}
    torch.save(content, tmp_path / "x.ckpt")
    assert read_checkpoint(tmp_path / "x.ckpt") == content
    torch.save(Call(bytearray, 5), tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True) == bytearray(5), "others read as before"
