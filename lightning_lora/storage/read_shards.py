"""Read a folder of torch's distributed checkpoint (DCP) whole, and run no code that is in it.

DCP's own reader unpickles the index ``.metadata``, which can run any code. Here each class that DCP writes there is replaced by a record
of plain values, and every other name is refused. Shards are read with ``weights_only=True``. If a later torch writes another class, or
another field, reading raises.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_lora.storage.bounded_pickle import Keys
from lightning_lora.storage.read_checkpoint import readable
from lightning_lora.storage.regular_files import open_regular, read_regular
from lightning_lora.storage.stored_size import check_checksums, check_records, check_tensors
from lightning_lora.utils.torch_private import PythonUnpickler

INDEX = ".metadata"
LARGEST = 2**28  # largest size of an index in bytes; it takes about 200 per shard of a tensor
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Record:
    """An object of the index: the name of its class, and its fields. It has no behaviour that a file could use."""

    def __init__(self, *arguments: object) -> None:
        self.fields: Any = {}

    def __setstate__(self, state: object) -> None:
        self.fields = state


def _shape(value: Any) -> tuple[int, ...]:
    """Return a shape or an offset of the index, once it is known to be one: it is multiplied, hashed and shown."""
    if type(value) is not tuple or len(value) > 64 or not all(type(each) is int and 0 <= each < 2**63 for each in value):
        raise ValueError("its index has a shape, or a place in a file, that is none")
    return value


def _name(value: Any) -> str:
    """Return a tensor's name, once it is known to be one."""
    if type(value) is not str:
        raise ValueError(f"its index has a {type(value).__name__} for a name")
    return value


_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    **{
        (_METADATA, name): type(name, (_Record,), {})
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
            *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): type("_StorageInfo", (_Record,), {}),
    ("torch.serialization", "_get_layout"): type("Layout", (_Record,), {}),
    **{(module, name): type(name, (_Record,), {}) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")},
    ("torch", "Size"): _shape,
}
_TENSOR: Any = _CLASSES[_METADATA, "TensorStorageMetadata"]


def _checked(instruction: bytes, added: Callable[[Any], tuple[object, Sequence[Any]]]) -> dict[int, Callable[[Any], None]]:
    """Return an entry of the unpickler's table that checks a container's new keys first."""
    carry_out = PythonUnpickler.dispatch[instruction[0]]

    def checked(unpickler: Any) -> None:
        unpickler.keys.check(*added(unpickler))
        carry_out(unpickler)

    return {instruction[0]: checked}


class _IndexUnpickler(PythonUnpickler):  # the one in C has no place for a check, and makes tables as long as a file says
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **PythonUnpickler.dispatch,
        **_checked(pickle.SETITEM, lambda unpickler: (unpickler.stack[-3], unpickler.stack[-2:-1])),
        **_checked(pickle.SETITEMS, lambda unpickler: (unpickler.metastack[-1][-1], unpickler.stack[::2])),
        **_checked(pickle.ADDITEMS, lambda unpickler: (unpickler.metastack[-1][-1], unpickler.stack)),
        **_checked(pickle.FROZENSET, lambda unpickler: (unpickler.stack, unpickler.stack)),
        **_checked(pickle.DICT, lambda unpickler: (unpickler.stack, unpickler.stack[::2])),
    }
    del dispatch[pickle.BYTEARRAY8[0]]  # it takes memory for as many bytes as the file says, before it reads them

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.keys = Keys()

    def find_class(self, module: str, name: str) -> Any:
        """Return the record that stands for a class of DCP's, or a dtype."""
        found = _CLASSES.get((module, name), _DTYPES.get(name) if module == "torch" else None)
        if found is None:
            raise ValueError(f"its index names {module}.{name}, which is no part of a distributed checkpoint")
        return found


def read_shards(folder: Path) -> dict[str, Tensor]:
    """Return name → tensor, whole and on the CPU, of every tensor in the folder.

    Raises:
        ValueError: the index or a shard is missing, damaged, or holds something else than DCP writes.
    """
    with readable(folder):
        index: Any = _IndexUnpickler(io.BytesIO(read_regular(folder / INDEX, LARGEST))).load()
        stored: Any = {_place(key.fields): info.fields for key, info in index.fields["storage_data"].items()}
        known = {_name(name): meta.fields for name, meta in index.fields["state_dict_metadata"].items() if isinstance(meta, _TENSOR)}
        whole = sum(math.prod(_shape(meta["size"])) * meta["properties"].fields[0].itemsize for meta in known.values())
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        read = sum(_shape((info["offset"], info["length"]))[1] for info in stored.values())
        if max(whole, read) > size:  # before memory is taken for it
            raise ValueError(f"its tensors have {max(whole, read):,} bytes, its files {size:,}")
        if sum(len(meta["chunks"]) for meta in known.values()) > len(stored):
            raise ValueError("its index names a shard more than once")
        return {name: _tensor(folder, name, meta, stored) for name, meta in known.items()}


def _place(fields: dict[str, Any]) -> tuple[str, tuple[int, ...] | None]:
    """Return name and offset of a shard."""
    offset = fields["offset"]
    return _name(fields["fqn"]), None if offset is None else _shape(offset)


def _tensor(folder: Path, name: str, meta: dict[str, Any], stored: dict[Any, dict[str, Any]]) -> Tensor:
    """Put one tensor together from its chunks."""
    dtype, size = meta["properties"].fields[0], meta["size"]
    chunks = [{name: _shape(value) for name, value in chunk.fields.items()} for chunk in meta["chunks"]]
    if math.prod(size) != sum(math.prod(chunk["sizes"]) for chunk in chunks):  # before memory is taken for it
        raise ValueError(f"{name!r} has shape {size}, and its shards do not fill that")
    parts = [(chunk, _chunk(folder, stored[name, chunk["offsets"]])) for chunk in chunks]
    if any(part.dtype != dtype or tuple(part.shape) != chunk["sizes"] for chunk, part in parts):
        raise ValueError(f"a shard of {name!r} has another shape or dtype than its index says")
    whole = torch.zeros(size, dtype=dtype)
    for chunk, part in parts:
        for dim, (start, length) in enumerate(zip(chunk["offsets"], chunk["sizes"], strict=True)):
            if start < 0 or start + length > size[dim]:
                raise ValueError(f"a shard of {name!r} lies outside of its shape {size}")
        whole[tuple(slice(start, start + length) for start, length in zip(chunk["offsets"], chunk["sizes"], strict=True))] = part
    return whole


def _chunk(folder: Path, info: dict[str, Any]) -> Tensor:
    file = info["relative_path"]
    if Path(file).name != file:
        raise ValueError(f"its index names the shard {file!r}, which is not in the folder")
    start, length = info["offset"], info["length"]
    with open_regular(folder / file) as stream:
        if not 0 <= start <= start + length <= stream.seek(0, 2):
            raise ValueError(f"the shard {file!r} ends before byte {start + length:,}")
        stream.seek(start)
        content = io.BytesIO(stream.read(length))
    check_records(content)
    check_checksums(content)
    part = torch.load(content, map_location="cpu", weights_only=True)
    check_tensors(part, length)
    if not isinstance(part, Tensor):
        raise ValueError(f"the shard {file!r} holds a {type(part).__name__}, not a tensor")
    return part
