"""Write a model's folder in one step. The old folder or the new one is there, complete. Nothing else is ever deleted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from lightning_lora.adapter_io.certificate import CERTIFICATE
from lightning_lora.cli.task_file import FILE
from lightning_lora.storage.atomic_files import sync_files
from lightning_lora.storage.folder_commit import commit, occupied
from lightning_lora.storage.room import check_room

# What transformers writes into a model's folder, and what a merge adds: its certificate, and the task's file.
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
    *("chat_template.*", "*processor_config.json", CERTIFICATE, FILE),
)


@contextmanager
def replaced_folder(out: str, overwrite: bool, keep: tuple[str, ...], room: int = 0) -> Iterator[Path]:
    """Yield a new folder beside ``out``, which takes its place at the end. After an error or a kill everything is as it was.

    Another process that writes to ``out`` is waited for.

    Args:
        out: The folder to create.
        overwrite: Replace a folder that holds a model.
        keep: Folders or files that ``out`` must neither be nor contain, since they would be deleted with it.
        room: The least size in bytes of what will be in it.

    Raises:
        ValueError: ``out`` is a file or cannot be written; it is not empty and ``overwrite`` is False; it holds something that is no model;
            it is or contains one of ``keep``; there is no room for it beside the old one.
    """
    if not out:
        raise ValueError("out='' is empty; name a folder")
    target = Path(out).resolve()
    check = partial(_check, out, target, overwrite, keep)
    check()
    check_room(target.parent, room, "out", "the new model takes at least")
    with commit(target, "config.json", check, drops=lambda name: True) as staged:
        yield staged
        sync_files(staged)


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
        raise ValueError(f"out={out!r} is a file; name a folder")
    for source in keep:
        if os.path.exists(source) and (path := Path(source).resolve()).is_relative_to(target):
            raise ValueError(f"out={out!r} holds {str(path)!r}, which it is made from; name another folder")
    there = sorted(target.iterdir()) if occupied(target) else []
    if there and not overwrite:
        raise ValueError(f"out={out!r} is not empty; name another folder, or pass --overwrite to replace the model in it")
    foreign = [entry.name for entry in there if entry.is_dir() or not any(fnmatch(entry.name, pattern) for pattern in MODEL_FILES)]
    if foreign or (there and not (target / "config.json").is_file()):
        what = f"holds {foreign[0]!r}" if foreign else "has no config.json"
        raise ValueError(
            f"out={out!r} {what}: --overwrite replaces a model, and this is more or none; name another folder, or empty it yourself"
        )
