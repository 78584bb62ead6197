"""Write a model's folder in one step. The old folder or the new one is there, complete. Nothing else is ever deleted."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from lightning_lora.adapter_io.certificate import CERTIFICATE
from lightning_lora.cli.messages import UsageError
from lightning_lora.storage.atomic_files import sync_folder
from lightning_lora.storage.room import check_room

try:
    import fcntl
except ImportError:  # Windows: what a killed run left stays
    fcntl = None  # type: ignore[assignment]

# What transformers writes into a model's folder, and the certificate of a merge.
MODEL_FILES = (
    *(
        "config.json",
        "generation_config.json",
        "*.safetensors",
        "*.safetensors.index.json",
        "pytorch_model*.bin",
        "pytorch_model*.bin.index.json",
    ),
    *(
        "tokenizer*.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "*.tiktoken",
        "spiece.model",
    ),
    *("chat_template.*", "*processor_config.json", CERTIFICATE),
)


@contextmanager
def replaced_folder(out: str, overwrite: bool, keep: tuple[str, ...], room: int = 0) -> Iterator[Path]:
    """Yield a new folder beside ``out``, and move it to ``out`` at the end. After an error everything is as it was.

    What a killed run left beside ``out`` is removed; its free lock shows that it ended. If it was killed while it replaced ``out``, the old
    folder is put back.

    Args:
        out: The folder to create.
        overwrite: Replace a folder that holds a model.
        keep: Folders or files that ``out`` must neither be nor contain, since they would be deleted with it.

        room: The least size in bytes of what will be in it.

    Raises:
        ValueError: There is no room for it, beside the old one.
        UsageError: ``out`` is a file or cannot be written; it is not empty and ``overwrite`` is False; it holds something that is no model;
            it is or contains one of ``keep``.
    """
    if not out:
        raise UsageError("out='' is empty; name a folder")
    target = Path(out).resolve()
    _clean(target)
    _check(out, target, overwrite, keep)
    if room:
        check_room(target.parent, room, "out", "the new model takes at least")
    made = [path for path in target.parents if not path.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=_prefix(target)))
    except OSError as error:
        raise UsageError(f"out={out!r} cannot be written: {error.strerror} ({error.filename})") from error
    try:
        with open(staging / "lock", "wb") as lock:
            _locked(lock)
            new = staging / "new"
            new.mkdir()
            yield new
            if target.exists():
                os.replace(target, staging / "old")  # a folder cannot be renamed onto one that is not empty
            os.replace(new, target)
            sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(staging)
        with suppress(OSError):  # someone else has put something there
            for path in made:
                path.rmdir()
        raise
    shutil.rmtree(staging)


def weight_bytes(model: str, gguf_file: str | None, dtype: str) -> int:
    """Return the least size in bytes of a model's weights once they are written again. Of a model that is not in a local folder: 0.

    Args:
        model: A hub id or a folder.
        gguf_file: A GGUF file in it.
        dtype: What the weights are converted to; "auto" keeps theirs.
    """
    patterns = [gguf_file] if gguf_file else ["*.safetensors", "pytorch_model*.bin"]
    size = max(sum(file.stat().st_size for file in Path(model).glob(pattern)) for pattern in patterns)
    return size if dtype in ("auto", "float32") else size // 2


def _check(out: str, target: Path, overwrite: bool, keep: tuple[str, ...]) -> None:
    if target.exists() and not target.is_dir():
        raise UsageError(f"out={out!r} is a file; name a folder")
    for source in keep:
        if os.path.exists(source) and (path := Path(source).resolve()).is_relative_to(target):
            raise UsageError(f"out={out!r} holds {str(path)!r}, which it is made from; name another folder")
    there = sorted(target.iterdir()) if target.exists() else []
    if there and not overwrite:
        raise UsageError(f"out={out!r} is not empty; name another folder, or pass --overwrite to replace the model in it")
    foreign = [entry.name for entry in there if entry.is_dir() or not any(fnmatch(entry.name, pattern) for pattern in MODEL_FILES)]
    if foreign or (there and not (target / "config.json").is_file()):
        what = f"holds {foreign[0]!r}" if foreign else "has no config.json"
        raise UsageError(
            f"out={out!r} {what}: --overwrite replaces a model, and this is more or none; name another folder, or empty it yourself"
        )


def _prefix(target: Path) -> str:
    return f".{target.name}-"


def _locked(lock: IO[bytes]) -> bool:
    """Take a lock, which the system releases when the process ends. Return False if another process has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another has it, or this filesystem has no locks
        return False
    return True


def _clean(target: Path) -> None:
    """Remove what killed runs left. Put back the old folder that such a run had moved away."""
    for left in target.parent.glob(f"{_prefix(target)}{'[a-z0-9_]' * 8}"):
        with suppress(FileNotFoundError), open(left / "lock", "r+b") as lock:  # a folder without a lock is still being made
            if not _locked(lock):
                continue
            if (left / "old").is_dir() and not target.exists():
                os.replace(left / "old", target)
            shutil.rmtree(left)
