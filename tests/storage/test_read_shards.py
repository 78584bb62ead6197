"""A folder of torch's distributed checkpoint is read whole, and nothing that a stranger put into it runs."""

from __future__ import annotations

import dataclasses
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightning_lora.storage.read_shards import INDEX, read_shards
from tests.storage.hostile import DEEP, DOUBLED

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.bool, torch.uint8]
TENSORS = {f"x/{dtype}": torch.randn(3, 4).mul(3).to(dtype) for dtype in DTYPES} | {
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "deep": torch.randn(2, 3, 4, 5),
    "part of another": torch.randn(6, 6)[2:4, ::2],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a save on one process
        dcp.save(TENSORS, checkpoint_id=tmp_path / "shards")
    return tmp_path / "shards"


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def test_what_dcp_saved_comes_back_to_the_bit(folder: Path) -> None:
    read = read_shards(folder)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_an_index_runs_no_code(folder: Path) -> None:
    index = pickle.loads((folder / INDEX).read_bytes())
    for function, arguments in ((os.mkdir, (str(folder / "ran"),)), (torch.load, ("x",)), (eval, ("1",)), (getattr, ("x", "upper"))):
        evil = Calls(function, *arguments)
        for content in (evil, [evil], {"x": evil}):
            (folder / INDEX).write_bytes(pickle.dumps(content))
            with pytest.raises(ValueError, match=r"its index names \S+, which is no part of a distributed checkpoint"):
                read_shards(folder)
        index.planner_data = evil  # inside an index that is right else
        (folder / INDEX).write_bytes(pickle.dumps(index))
        with pytest.raises(ValueError, match="its index names"):
            read_shards(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}X\x01\x00\x00\x00xK\x01stb.",  # sets an attribute of the class
        b"ctorch\nSize\n(N}X\x01\x00\x00\x00xK\x01stb.",
        b"ctorch.distributed.checkpoint.metadata\nMetadata.__class__\n.",
        b"ctorch\n__builtins__\n.",
        b"Px\n.",  # a persistent id
        b"",
        b"N.",
        b"Nr\xff\xff\xff\x7f.",  # a number by which Python would make a table of 32 GB
        b"}" + DOUBLED + b"Ns.",
        b"}(" + DOUBLED + b"Nu.",
        b"(" + DOUBLED + b"Nd.",
        b"\x8f(" + DOUBLED + b"\x90.",
        b"(" + DOUBLED + b"\x91.",
        b"}" + DEEP + b"Ns.",
        b"\x96" + (10**12).to_bytes(8, "little") + b".",  # a buffer of 10^12 bytes
        b"ctorch\nSize\n](K\1K\2e\x85R.",
    ],
)
def test_a_written_pickle_reaches_nothing(folder: Path, program: bytes) -> None:
    (folder / INDEX).write_bytes(program)
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        read_shards(folder)
    torch.Size([1])
    assert not hasattr(dcp.metadata.Metadata, "x")
    (folder / INDEX).unlink()
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        read_shards(folder)


def test_a_shard_runs_no_code(folder: Path) -> None:
    index = pickle.loads((folder / INDEX).read_bytes())
    file = folder / "__0_0.distcp"
    evil = torch.save(Calls(os.mkdir, str(folder / "ran")), file)
    assert evil is None
    for info in index.storage_data.values():
        info.offset, info.length = 0, file.stat().st_size
    (folder / INDEX).write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        read_shards(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "what",
    ["path", "size", "dtype", "offset", "huge", "many", "repeated", "tuples", "name", "number", "overlap", "empty", "fifo", "gone", "cut"],
)
def test_an_index_that_lies_is_refused(folder: Path, what: str) -> None:
    index = pickle.loads((folder / INDEX).read_bytes())
    meta = index.state_dict_metadata["deep"]
    key, info = next((key, info) for key, info in index.storage_data.items() if key.fqn == "deep")
    shard = folder / info.relative_path
    if what == "path":
        info.relative_path = f"../{folder.name}/{info.relative_path}"
    elif what == "size":
        meta.size = torch.Size([2, 3, 4, 6])
    elif what == "dtype":
        meta.properties.dtype = torch.int32
    elif what == "offset":
        meta.chunks[0].offsets = torch.Size([1, 0, 0, 0])
    elif what == "huge":  # refused before memory is taken
        meta.size = meta.chunks[0].sizes = torch.Size([2**40, 1, 1, 1])
    elif what == "many":  # each of them the same bytes
        index.state_dict_metadata |= {f"again{number}": meta for number in range(1000)}
        index.storage_data |= {dataclasses.replace(key, fqn=name): info for name in index.state_dict_metadata if name.startswith("again")}
    elif what == "repeated":  # a shard that is one number, seen as 2^30
        torch.save(torch.zeros(1).expand(2**30), shard)
        meta.size = meta.chunks[0].sizes = torch.Size([2**30])
        meta.chunks[0].offsets, info.offset, info.length = torch.Size([0]), 0, shard.stat().st_size
        index.storage_data[dataclasses.replace(key, offset=torch.Size([0]))] = info
        (folder / "holes").touch()
        os.truncate(folder / "holes", 2**33)
    elif what == "tuples":  # 2^40 times a tuple
        meta.size = (2**40, (1,))
    elif what == "name":  # it would be shown
        doubled: Any = ()
        for _ in range(45):
            doubled = (doubled, doubled)
        object.__setattr__(key, "fqn", [doubled])
    elif what == "number":  # a product of such takes as long as a file says
        meta.size = (256**1000,) * 100
    elif what == "overlap":  # little is made of it, and the same bytes are read again and again
        for other in index.storage_data.values():
            other.offset, other.length = 0, shard.stat().st_size
    elif what == "empty":  # tensors without entries, each of them many shards
        index.state_dict_metadata["empty"].chunks *= 1000
    elif what == "fifo":
        shard.unlink()
        os.mkfifo(shard)
    elif what == "gone":
        del index.storage_data[next(key for key in index.storage_data if key.fqn == "deep")]
    else:
        shard.write_bytes(shard.read_bytes()[: info.offset + 10])
    (folder / INDEX).write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        read_shards(folder)
