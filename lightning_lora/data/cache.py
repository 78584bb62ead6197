"""Keep encoded rows on disk, found again by what they were made of: the files' content, the tokenizer, the settings and this package.

A cache is a convenience: what cannot be read is made again, and where nothing can be written the run goes on.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError

from lightning_lora.data.store import Examples

FOLDER = "LIGHTNING_LORA_CACHE"  # the environment variable that names another folder
UNUSED = 30 * 24 * 3600.0  # seconds without use, after which a file is removed
# Attributes of data modules that do not change the encoded rows.
BATCHING = ("batch_size", "packing", "pack_length", "pad_to_multiple_of", "num_workers", "cache", "streaming")
ROWS = ("sources", "examples")  # which `key_of` gets by content
PLAIN = (str, int, float, bool, type(None), list, tuple, dict)


def cache_folder(cache: bool | str) -> Path | None:
    """Return the folder that ``data.cache`` means; None for no cache."""
    if not cache:
        return None
    return Path(cache if isinstance(cache, str) else os.environ.get(FOLDER, "~/.cache/lightning_lora")).expanduser()


def settings_of(module: Any) -> str:
    """Return all that a data module's encoding depends on beside rows and tokenizer: its plain public attributes, and its code."""
    without = BATCHING + ROWS
    values = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in without and isinstance(v, PLAIN)}
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    for cls in type(module).__mro__:
        code.update(_source(cls))
    return json.dumps([type(module).__qualname__, values, code.hexdigest()], sort_keys=True, default=str)


@lru_cache(maxsize=64)  # finding a class in its file takes hundredths of a second
def _source(cls: type) -> bytes:
    try:
        return inspect.getsource(cls).encode()
    except (OSError, TypeError):  # built-in, or typed into a session
        return b""


def tokenizer_state(tokenizer: Any) -> str:
    """Return what a tokenizer's tokens depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    versions = [version(package) for package in ("transformers", "tokenizers")]
    return json.dumps([versions, type(tokenizer).__name__, content, tokenizer.chat_template, special], sort_keys=True, default=str)


def key_of(content: Iterable[Path | tuple[str, Any]], *texts: str) -> str:
    """Return a name for the content of files, or of rows, and for some texts."""
    key = hashlib.sha256()
    for item in content:
        part = hashlib.sha256()
        if isinstance(item, Path):
            with item.open("rb") as opened:
                while block := opened.read(1 << 20):
                    part.update(block)
        else:
            part.update(json.dumps(item[1], sort_keys=True, default=str).encode())
        key.update(part.digest())
    for text in texts:
        key.update(hashlib.sha256(text.encode()).digest())
    return key.hexdigest()[:40]


def read_cache(file: Path, kind: type) -> tuple[Examples, dict[str, Any]] | None:
    """Return the examples and notes in a file; None if there is none that can be read."""
    try:
        found: tuple[Examples, dict[str, Any]] = Examples.load(file, kind)
        with suppress(OSError):  # of a folder that others may only read
            os.utime(file)
        return found
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        rank_zero_warn(f"{file} cannot be read ({error}), so the rows are tokenized again")
        return None


def write_cache(file: Path, examples: Examples, notes: dict[str, Any]) -> None:
    """Write a file, and remove those that were not used for a month."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        examples.save(file, notes)
        for other in file.parent.glob("*.safetensors"):
            if time.time() - other.stat().st_mtime > UNUSED:
                other.unlink(missing_ok=True)
    except OSError as error:
        rank_zero_warn(f"the tokenized rows cannot be kept in {file.parent} ({error.strerror}), so the next run tokenizes them again")
