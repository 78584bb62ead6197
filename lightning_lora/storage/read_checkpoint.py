"""Read a checkpoint file from an unknown source: load tensors and plain values, run no code.

A pickle can run any code when it is read. So every file is read with ``weights_only=True``, whatever Lightning's or torch's default
is, and no path leads to a download. ``weights_only=False`` is a user's own choice, for a file on this machine.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_lora.storage.bounded_pickle import BoundedUnpickler
from lightning_lora.storage.regular_files import WrongPath, open_regular
from lightning_lora.storage.stored_size import check_checksums, check_records, check_tensors
from lightning_lora.utils.torch_private import unpickling_with

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(::|://)")
_LOCAL = {"file", "local"}
#: Storages that a user logs in to and Lightning writes checkpoints to. Every other scheme is a download from an unknown source.
_STORAGES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "hdfs", "memory"}
#: What torch raises for a file that is cut short, damaged or of another kind.
UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, TypeError, AttributeError, ValueError),
    *(AssertionError, ArithmeticError, struct.error, zipfile.BadZipFile),
)


def located(path: str | Path, weights_only: bool | None) -> tuple[str, bool]:
    """Return the path to read, without ``file://``, and whether to read it with ``weights_only=True``.

    Args:
        path: a path on this machine, or in a storage such as ``s3://``.
        weights_only: what the user asked for. None means True.

    Raises:
        ValueError: the path is a URL; or ``weights_only=False`` for a file elsewhere.
    """
    text = str(path)
    scheme = _SCHEME.match(text)
    if scheme is None or (scheme[1].lower() in _LOCAL and scheme[2] == "://"):
        return text[scheme.end() if scheme else 0 :], weights_only is not False
    if scheme[1].lower() not in _STORAGES or "::" in text:  # "::" leads on to another source
        raise ValueError(f"{text} is a URL, and no checkpoint is read from there: download it, and pass the path of the file.")
    if weights_only is False:
        raise ValueError(
            f"weights_only=False lets {text} run any code, and it is not on this machine: leave weights_only out, or copy the file here."
        )
    return text, True


def read_checkpoint(path: str | Path, weights_only: bool | None = None) -> Any:
    """Read a file that ``torch.save`` wrote, onto the CPU.

    Args:
        path: a file on this machine.
        weights_only: False lets the file run code; None and True do not.

    Raises:
        WrongPath: there is no such file.
        ValueError: the path is a URL, or the file is damaged, holds more than tensors and plain values, or would take more
            memory than it has bytes.
    """
    text, weights_only = located(path, weights_only)
    if not Path(text).is_file():
        raise WrongPath(f"Checkpoint file not found: {text}{' is no file' if Path(text).exists() else ''}.")
    with readable(text), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # the file is read whole, or refused
        with open_regular(Path(text)) as file, ThreadPoolExecutor(1) as beside:
            check_records(file)
            checked = beside.submit(check_checksums, file)  # it takes about half as long as loading does
            try:
                content = torch.load(text, map_location="cpu", weights_only=weights_only)
            finally:
                checked.result()  # in place of what torch says of a damaged record
        check_tensors(content, Path(text).stat().st_size)
    return content


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turn what torch raises into one line, while a file is read inside the ``with`` block. Bound what the file can make.

    Raises:
        ValueError: the file is damaged, or holds more than tensors and plain values; the message names what.
    """
    try:
        with unpickling_with(BoundedUnpickler):
            yield
    except UNREADABLE as error:
        names = _refused_globals(path) if isinstance(error, pickle.UnpicklingError) else []
        raise ValueError(f"{path} is not a readable checkpoint: {_why(path, names, error)}") from error


def _why(path: str | Path, names: list[str], error: Exception) -> str:
    if names:
        found = ", ".join(names[:4])
        return (
            f"it holds {found}, which can run code. If you trust the file, read it within torch.serialization.safe_globals([{found}]), or"
            " pass weights_only=False to fit, validate, test or predict."
        )
    if Path(path).is_file() and Path(path).stat().st_size == 0:
        return "the file is empty."
    detail = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0] or type(error).__name__
    detail = f"KeyError: {detail}" if isinstance(error, KeyError) else detail  # its text is the key alone
    return f"it was not written by torch.save, or it is damaged ({detail})."


def _refused_globals(path: str | Path) -> list[str]:
    """Return what the file would import and ``weights_only=True`` does not let it; nothing for a file that is no checkpoint at all."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except UNREADABLE:
        return []
