"""What one callback adapted, and how a checkpoint tells of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_lora.adapter_io.files import AdapterFile, understood
from lightning_lora.config import LoRAConfig


@dataclass
class AdaptedPart:
    """What one callback adapted.

    Attributes:
        root: name of the submodule that adapter files are relative to ("" for the module itself).
        config: what it was adapted with.
        check_base: refuse checkpoints that were trained on another base.
        lora_plus_ratio: how many times A's learning rate B gets.
        before_load: called with the config of a checkpoint before it is held against the module, which it may change to fit.
    """

    root: str
    config: LoRAConfig
    check_base: bool = True
    lora_plus_ratio: float = 1.0
    before_load: Callable[[LoRAConfig], None] | None = None


def meta_of(parts: Mapping[str, AdaptedPart], base: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What a checkpoint says of its adapters: of the first as adapter files do, of others in a list.

    Args:
        parts: root → part.
        base: gives the base's identity for a root.
    """
    first, *others = (AdapterFile(part.config, {}, base(root)).meta(root=root) for root, part in parts.items())
    return {**first, "others": others} if others else first


def parts_in(meta: dict[str, Any], parts: Mapping[str, AdaptedPart], where: str) -> dict[str, dict[str, Any]]:
    """Root here → what a checkpoint says of it.

    Raises:
        ValueError: it is of a newer format, or has adapters on other submodules.
    """
    for part in (meta, *meta.get("others", ())):
        understood(part, where)
    found = {part["root"]: part for part in (meta, *meta.get("others", ()))}
    if len(found) == len(parts) == 1:
        return dict(zip(parts, found.values(), strict=True))
    if found.keys() != parts.keys():
        raise ValueError(f"{where} has adapters on {sorted(found)}, here they are on {sorted(parts)}: use the same LoRACallbacks.")
    return found
