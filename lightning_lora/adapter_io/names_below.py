"""Configs for the module that names in files are relative to, where a config's patterns name what is around it.

A LightningModule with one child is adapted as a whole, and its file is for the child alone. So ``model.layers.2`` in a config finds nothing
in a file's names. The layers' exact names take its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_lora.adapter_io.exported import with_parent
from lightning_lora.adapter_io.extras import is_adapter
from lightning_lora.adapter_io.files import AdapterFile
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.factors import Exported
from lightning_lora.model.fused_slices import names_of
from lightning_lora.model.targeting import resolve
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.patterns import compile_patterns

Settings = tuple[int, float, str | None]  # rank, alpha, kind


def below(
    prefix: str, root: nn.Module, config: LoRAConfig, layers: Mapping[str, LoRALayer], exported: Mapping[str, Exported]
) -> LoRAConfig:
    """Return the config for a file of the layers below ``root``.

    Args:
        prefix: name of ``root`` in the module that is saved. Empty: they are the same.
        root: the module that names are relative to.
        config: describes the layers, by names that may begin with the prefix.
        layers: the layers, by their names below it.
        exported: what the file has of each.
    """
    if not prefix:
        return config
    own: dict[str, Settings] = {
        fqn: (*(each.own or (each.rank, each.alpha)), each.kind) for fqn, each in exported.items() if layers[fqn].low_rank
    }
    try:
        found = {clean_name(t.fqn): (t.rank, t.alpha, t.spec.kind) for t in resolve(root, config, frozen_parts=True).targets}
    except ValueError:  # a pattern names what is around it
        found = {}
    named = {fqn: names_of(fqn, layers[fqn].spec.slices) for fqn in own if not with_parent(fqn, layers)}
    return config if found == own else _exact(config, {name: own[fqn] for fqn, names in named.items() for name in names})


def from_around(adapter: AdapterFile) -> Iterator[LoRAConfig]:
    """Yield configs that a checkpoint's may mean, with patterns that begin with the end of its root's name."""
    config, parts = adapter.config, adapter.root.split(".") if adapter.root else []
    layers = {name.partition(".lora_")[0]: None for name in adapter.tensors if is_adapter(name)}
    for k in reversed(range(len(parts))):
        prefix = ".".join(parts[k:])

        def value(field: str, fqn: str, default: Any, prefix: str = prefix) -> Any:
            table = getattr(config, field)
            return next((table[p.text] for p in compile_patterns(list(table), field) if p.matches(f"{prefix}.{fqn}")), default)

        yield _exact(
            config,
            {
                fqn: (
                    value("rank_pattern", fqn, config.rank),
                    value("alpha_pattern", fqn, config.alpha),
                    value("kind_pattern", fqn, None),
                )
                for fqn in layers
            },
        )


def _exact(config: LoRAConfig, settings: Mapping[str, Settings]) -> LoRAConfig:
    """Return the config with one pattern for each name, whose settings are given."""
    patterns = {name: f"^{re.escape(name)}$" for name in settings}
    ranks, alphas, kinds = ({patterns[name]: each[i] for name, each in settings.items()} for i in range(3))
    return replace(
        config,
        target_modules=list(patterns.values()),
        exclude_modules=(),
        layers=None,
        rank_pattern=ranks,  # type: ignore[arg-type]
        alpha_pattern=alphas,  # type: ignore[arg-type]
        kind_pattern={name: kind for name, kind in kinds.items() if kind is not None},  # type: ignore[misc]
    )
