"""Encoded rows, column by column: a list of Python integers takes nine times the memory, and needs pickle to be saved.

A field of integers is one tensor with the places where the rows begin. Any other field is text in JSON. So the file of a cache is a
safetensors file, which is read without running code and stays on the disk until a row is asked for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_lora.storage.atomic_files import write_atomic

T = TypeVar("T")
NUMBERS = ("list[int]", list[int])


class Examples(Sequence[T]):
    """A read-only list of instances of one dataclass.

    Args:
        cls: The dataclass. ``len`` of an instance is its length in tokens.
        columns: The fields' tensors, from `pack` or a file.
    """

    def __init__(self, cls: type[T], columns: dict[str, Tensor]) -> None:
        self.cls, self.columns = cls, columns

    @classmethod
    def pack(cls, kind: type[T], examples: Iterable[T]) -> Examples[T]:
        """Pack instances of ``kind``."""
        rows = list(examples)
        columns = {"length": torch.tensor([len(row) for row in rows], dtype=torch.int32)}  # type: ignore[arg-type]
        for field in dataclasses.fields(kind):  # type: ignore[arg-type]
            values = [getattr(row, field.name) for row in rows]
            if field.type in NUMBERS:
                flat = torch.tensor([number for value in values for number in value], dtype=torch.int32)
            else:
                values = [json.dumps(value).encode() for value in values]
                joined = bytearray(b"".join(values))
                flat = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
            columns |= {field.name: flat, f"{field.name}.ends": torch.tensor([0, *map(len, values)]).cumsum(0)}
        return Examples(kind, columns)

    @classmethod
    def joined(cls, parts: Sequence[Examples[T]]) -> Examples[T]:
        """Return the rows of all parts."""
        columns = {}
        for name in parts[0].columns:
            pieces = [part.columns[name] for part in parts]
            if name.endswith(".ends"):
                starts = [0, *(int(piece[-1]) for piece in pieces)]
                shifts = torch.tensor(starts).cumsum(0).tolist()
                pieces = [piece[bool(i) :] + shift for i, (piece, shift) in enumerate(zip(pieces, shifts, strict=False))]
            columns[name] = torch.cat(pieces)
        return Examples(parts[0].cls, columns)

    def arrays(self) -> dict[str, Any]:
        """Return the columns for another process, as arrays: torch would send each tensor as a file of shared memory."""
        return {name: column.numpy() for name, column in self.columns.items()}

    @classmethod
    def of_arrays(cls, kind: type[T], arrays: dict[str, Any]) -> Examples[T]:
        """Return the rows of `arrays`."""
        return Examples(kind, {name: torch.from_numpy(array) for name, array in arrays.items()})

    @property
    def lengths(self) -> list[int]:
        """Every row's length in tokens."""
        return self.columns["length"].tolist()

    def __len__(self) -> int:
        return len(self.columns["length"])

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row, values = range(len(self))[index], {}
        for field in dataclasses.fields(self.cls):  # type: ignore[arg-type]
            start, end = self.columns[f"{field.name}.ends"][row : row + 2].tolist()
            value = self.columns[field.name][start:end]
            values[field.name] = value.tolist() if field.type in NUMBERS else json.loads(bytes(value.tolist()))
        return self.cls(**values)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def save(self, file: Path, notes: dict[str, Any]) -> None:
        """Write all rows and ``notes`` (values of JSON) in one step."""
        write_atomic(file, save(self.columns, {"notes": json.dumps(notes)}))

    @classmethod
    def load(cls, file: Path, kind: type[T]) -> tuple[Examples[T], dict[str, Any]]:
        """Return what `save` wrote.

        Raises:
            SafetensorError: The file is damaged.
        """
        with safe_open(file, "pt") as opened:
            return Examples(kind, {name: opened.get_tensor(name) for name in opened.keys()}), json.loads(opened.metadata()["notes"])  # noqa: SIM118
