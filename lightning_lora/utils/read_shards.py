"""Read a folder of torch's distributed checkpoint (DCP) whole, and run no code that is in it.

DCP's own reader unpickles the index ``.metadata``, which can run any code. Here each class that DCP writes there is replaced by a record
of plain values, and every other name is refused. Shards are read with ``weights_only=True``. If a later torch writes another class, or
another field, reading raises.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.utils.read_checkpoint import readable

INDEX = ".metadata"
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Record:
    """An object of the index: the name of its class, and its fields. It has no behaviour that a file could use."""

    def __init__(self, *arguments: object) -> None:
        self.fields: Any = {}

    def __setstate__(self, state: object) -> None:
        self.fields = state


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
    ("torch", "Size"): tuple,
}
_TENSOR: Any = _CLASSES[_METADATA, "TensorStorageMetadata"]


class _IndexUnpickler(pickle.Unpickler):
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
        index: Any = _IndexUnpickler(io.BytesIO((folder / INDEX).read_bytes())).load()
        stored: Any = {(key.fields["fqn"], key.fields["offset"]): info.fields for key, info in index.fields["storage_data"].items()}
        known = {name: meta.fields for name, meta in index.fields["state_dict_metadata"].items() if isinstance(meta, _TENSOR)}
        return {name: _tensor(folder, name, meta, stored) for name, meta in known.items()}


def _tensor(folder: Path, name: str, meta: dict[str, Any], stored: dict[Any, dict[str, Any]]) -> Tensor:
    """Put one tensor together from its chunks."""
    dtype, size = meta["properties"].fields[0], meta["size"]
    chunks = [chunk.fields for chunk in meta["chunks"]]
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
    with (folder / file).open("rb") as stream:
        stream.seek(info["offset"])
        part = torch.load(io.BytesIO(stream.read(info["length"])), map_location="cpu", weights_only=True)
    if not isinstance(part, Tensor):
        raise ValueError(f"the shard {file!r} holds a {type(part).__name__}, not a tensor")
    return part
