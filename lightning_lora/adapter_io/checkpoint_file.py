"""Read a checkpoint file without running code that is in it."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

# What torch's readers of zip files and pickles raise on files that are none, are cut off or were changed.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError)


def load_checkpoint_file(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Return the content of a file that ``torch.save`` wrote, with tensors on the CPU.

    Args:
        path: The file.
        mmap: Read tensors when they are used, for a look at the rest.

    Raises:
        ValueError: The file is no checkpoint, is damaged, or holds objects other than tensors and plain types.
        OSError: It cannot be read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UNREADABLE as error:
        raise ValueError(why_unreadable(path, error)) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} was not written under LoRACallback: it holds a {type(content).__name__}, no checkpoint.")
    return content


def why_unreadable(path: str | Path, error: BaseException) -> str:
    """Say on one line why a file cannot be read as a checkpoint, from what torch raised."""
    foreign = re.search(r"GLOBAL (\S+) was not an allowed global|Unsupported (?:global|class) (\S+)", str(error))
    if foreign is not None:
        return (
            f"{path} is not a readable checkpoint: it holds an object of {foreign[1] or foreign[2]}, which can run code. If you trust the"
            " file, pass weights_only=False, or add the class by torch.serialization.add_safe_globals."
        )
    if Path(path).is_file() and Path(path).stat().st_size == 0:
        return f"{path} is not a readable checkpoint: the file is empty."
    detail = next(iter(str(error).splitlines()), "") if isinstance(error, RuntimeError) and "mmap" not in str(error) else ""
    return f"{path} is not a readable checkpoint: it was not written by torch.save, or it is damaged{f' ({detail})' if detail else ''}."
