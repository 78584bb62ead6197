"""Check what adapter files and checkpoints say of an adapter beside its tensors: format version, config, base, root."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.spec import check_options

FORMAT_VERSION = 1
META = "lightning_lora"  # key of our entry in the safetensors metadata and in a Lightning checkpoint
_IDENTITY = {"fingerprint": (str,), "class": (str,), "name": (str, type(None))}


def understood(meta: Any, where: str) -> tuple[LoRAConfig, dict[str, Any] | None, str]:
    """Return the config, base identity and root that the metadata holds.

    Raises:
        ValueError: the format is newer, or the metadata is malformed, or names a variant or an init that is not known here.
    """
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(f"{where} has format version {version}, this lightning-lora reads up to {FORMAT_VERSION}; update it.")
    if wrong := _malformed(meta):
        raise ValueError(_unreadable(where, wrong))
    try:
        config = LoRAConfig(**meta["config"])
    except TypeError as error:  # a field that is not known here
        raise ValueError(_unreadable(where, str(error))) from error
    except ValueError as error:
        raise ValueError(f"{where}: its config is wrong: {error}") from error
    try:
        check_options(config)  # raises for an unknown variant, init or kind too
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return config, meta["base"], meta.get("root", "")


def began_with(meta: dict[str, Any], config: LoRAConfig) -> LoRAConfig:
    """Return the config that a checkpoint's run began with. It has other ranks than its config if they changed in the run.

    Args:
        meta: what :func:`understood` has read.
        config: the config that it returned.
    """
    return replace(config, **meta.get("began", {}))


def _unreadable(where: str, why: str) -> str:
    return f"{where}: its {META} metadata is not readable ({why}): a newer version wrote it, or it was changed by hand."


def _malformed(meta: Any) -> str | None:
    if not isinstance(meta, dict):
        return f"it is of type {type(meta).__name__}, not a mapping"
    types: dict[str, tuple[type, ...]] = {"format_version": (int,), "config": (dict,), "base": (dict, type(None))}
    given = {"root": "", **meta}
    for name, allowed in {**types, "root": (str,)}.items():
        if not isinstance(given.get(name, ...), allowed):
            return f"{name!r} is {given[name]!r}" if name in given else repr(name)
    for name, allowed in _IDENTITY.items() if meta["base"] is not None else ():
        if not isinstance(meta["base"].get(name, ...), allowed):
            return f"base has {name!r}: {meta['base'].get(name)!r}"
    if not all(isinstance(key, str) for key in meta["config"]):
        return "config has keys that are no names"
    if not isinstance(began := meta.get("began", {}), dict) or not began.keys() <= {"rank_pattern", "alpha_pattern"}:
        return f"'began' is {began!r}"
    for name in ("beside", "others"):
        if not isinstance(meta.get(name, []), list):
            return f"{name!r} is {meta[name]!r}"
    return None if all(isinstance(name, str) for name in meta.get("beside", [])) else "'beside' has entries that are no names"


def parsed(text: str, where: str) -> dict[str, Any]:
    """Parse JSON.

    Args:
        text: the JSON.
        where: the file, for messages.

    Raises:
        ValueError: the text is not JSON, is nested too deep, or has a value of another type.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a {type(value).__name__}, not a JSON object.")
    return value
