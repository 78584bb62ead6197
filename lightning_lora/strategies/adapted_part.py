"""Describe the part that one callback adapted, and write several parts into a checkpoint's metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_lora.adapter_io.files import AdapterFile
from lightning_lora.config import LoRAConfig


@dataclass
class AdaptedPart:
    """The part of a module that one callback adapted.

    Attributes:
        root: name of the submodule that names in adapter files are relative to ("" for the module itself).
        config: the config that the part was adapted with.
        check_base: refuse checkpoints that were trained on another base.
        lora_plus_ratio: B's learning rate divided by A's.
        allow_nonfinite: write and load checkpoints with NaN or infinity in what trains.
        layers: names of the layers that were adapted, in the part.
        precondition: method that its gradients are preconditioned by; None: they are not.
        before_load: called with a checkpoint's config before the module is checked against it. It may change the module to fit.
        began: the config that the run began with, if the layers' ranks have changed since; None if they have not.
        take_ranks: gives the layers the ranks of a checkpoint's config; None if they cannot change.
        before_setup: called before the strategy wraps the module and makes its optimizers.
        after_setup: called after that, before a checkpoint is loaded. None: nothing is left to do then.
    """

    root: str
    config: LoRAConfig
    check_base: bool = True
    lora_plus_ratio: float = 1.0
    allow_nonfinite: bool = False
    layers: Sequence[str] = ()
    precondition: str | None = None
    before_load: Callable[[LoRAConfig], None] | None = None
    began: LoRAConfig | None = None
    take_ranks: Callable[[LoRAConfig], None] | None = None
    before_setup: Callable[[], None] = lambda: None
    after_setup: Callable[[], object] | None = None


def meta_of(parts: Mapping[str, AdaptedPart], base: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Return a checkpoint's metadata: the first part's as in adapter files, the others' in the list ``others``.

    Args:
        parts: root → part.
        base: returns the base's identity for a root.
    """

    def began(config: LoRAConfig | None) -> dict[str, Any]:
        return {} if config is None else {"began": {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}}

    first, *others = (AdapterFile(part.config, {}, base(root)).meta(root=root, **began(part.began)) for root, part in parts.items())
    return {**first, "others": others} if others else first


def parts_in(meta: dict[str, Any], parts: Mapping[str, AdaptedPart], where: str) -> dict[str, dict[str, Any]]:
    """Return root in this module → the metadata of that part in a checkpoint.

    A single part here takes a checkpoint's single part, under any root.

    Args:
        meta: checked, with its ``others``.
        parts: root → part here.
        where: the file, for messages.

    Raises:
        ValueError: the metadata has adapters on other submodules.
    """
    found = {part.get("root", ""): part for part in (meta, *meta.get("others", ()))}
    if len(found) == len(parts) == 1:
        return dict(zip(parts, found.values(), strict=True))
    if found.keys() != parts.keys():
        raise ValueError(f"{where} has adapters on {sorted(found)}, here they are on {sorted(parts)}: use the same LoRACallbacks.")
    return found
