"""Configs for the module that names in files are relative to, where a config's patterns name what is around it.

A LightningModule with one child is adapted as a whole, and its file is for the child alone. So ``model.layers.2`` in a config finds nothing
in a file's names. The exact names of what it means take its place.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from torch import nn

from lightning_lora.adapter_io.exported import with_parent
from lightning_lora.adapter_io.extras import extra_tensors, is_adapter
from lightning_lora.adapter_io.files import AdapterFile
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import PREFIX, LoRALayer
from lightning_lora.layers.factors import Exported
from lightning_lora.model.fused_slices import names_of
from lightning_lora.model.heads import saved_modules
from lightning_lora.model.target_report import TargetReport
from lightning_lora.model.targeting import resolve
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.patterns import exactly

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
    saved = saved_modules(root, replace(config, modules_to_save="auto"))  # of an adapted model: what it trains in full
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were given when LoRA was applied
            report = resolve(root, config, frozen_parts=True)
    except ValueError:  # a pattern names what is around it
        report = None
    if report is not None and _settings(report) == own and sorted(report.saved) == sorted(saved):
        return config
    named = {fqn: names_of(fqn, layers[fqn].spec.slices) for fqn in own if not with_parent(fqn, layers)}
    return _exact(config, {name: own[fqn] for fqn, names in named.items() for name in names}, saved)


def resolve_file(root: nn.Module, adapter: AdapterFile) -> tuple[LoRAConfig, TargetReport]:
    """Return what an adapter's config selects, and the config by names below ``root``.

    A checkpoint's config may mean names around its root. Of the readings that find something, the first counts that finds all of the file.

    Raises:
        ValueError: its config does not fit this model.
    """
    first: tuple[LoRAConfig, TargetReport] | None = None
    problem: ValueError | None = None
    for config in (adapter.config, *_readings(root, adapter)):
        try:
            found = config, resolve(root, config, frozen_parts=True)
        except ValueError as error:
            problem = problem or error  # the first is the one to tell
            continue
        if not adapter.root or _finds_all(root, adapter, *found):
            return found
        first = first or found
    if first is None:
        raise problem or ValueError(f"{adapter.config} finds nothing")
    return first


def _readings(root: nn.Module, adapter: AdapterFile) -> Iterator[LoRAConfig]:
    """Yield what a checkpoint's config may mean, if its names begin with the end of its root's name."""
    parts = adapter.root.split(".") if adapter.root else []
    around = root
    for k in reversed(range(len(parts))):
        shell = nn.Module()
        shell.add_module(parts[k], around)
        around, prefix = shell, ".".join(parts[k:]) + "."
        try:
            report = resolve(around, adapter.config, frozen_parts=True)
        except ValueError:
            continue
        if any(not name.startswith(prefix) for name in (*(t.fqn for t in report.targets), *report.saved)):
            continue  # it means what is around the root
        settings = {name.removeprefix(prefix): own for name, own in _by_name(report).items()}
        rows = {t.fqn.removeprefix(prefix): list(t.spec.rows) for t in report.rows if not t.spec.rows_of}
        config = _exact(adapter.config, settings, [name.removeprefix(prefix) for name in report.saved])
        named = isinstance(config.trainable_token_indices, Mapping)
        yield replace(config, trainable_token_indices={exactly(fqn): own for fqn, own in rows.items()}) if named else config


def _finds_all(root: nn.Module, adapter: AdapterFile, config: LoRAConfig, report: TargetReport) -> bool:
    """Return whether a config finds the file's layers, and what was trained in full."""
    layers = {name.partition(f".{PREFIX}")[0] for name in adapter.tensors if is_adapter(name)}
    found = {clean_name(target.fqn) for target in (*report.targets, *report.rows) if not target.spec.rows_of}  # tied ones have no tensors
    trained = {name for name in adapter.tensors if not is_adapter(name)} - adapter.beside
    return found == layers and trained <= extra_tensors(root, config, layers).keys()


def _settings(report: TargetReport) -> dict[str, Settings]:
    return {clean_name(target.fqn): (target.rank, target.alpha, target.spec.kind) for target in report.targets}


def _by_name(report: TargetReport) -> dict[str, Settings]:
    """Return the settings by the names that a config uses, without layers that are adapted together with the module around them."""
    together = {f"{clean_name(target.fqn)}.{name}" for target in report.targets for name in target.kind.children_too}
    named = {clean_name(target.fqn): target.names for target in report.targets}
    return {clean_name(name): own for fqn, own in _settings(report).items() if fqn not in together for name in named[fqn]}


def _exact(config: LoRAConfig, settings: Mapping[str, Settings], saved: Collection[str]) -> LoRAConfig:
    """Return the config with one pattern for each name: of the layers, whose settings are given, and of what is trained in full."""
    ranks, alphas, kinds = ({exactly(name): each[i] for name, each in settings.items()} for i in range(3))
    return replace(
        config,
        target_modules=[*ranks],
        exclude_modules=(),
        layers=None,
        rank_pattern=ranks,  # type: ignore[arg-type]
        alpha_pattern=alphas,  # type: ignore[arg-type]
        kind_pattern={name: kind for name, kind in kinds.items() if kind is not None},  # type: ignore[misc]
        modules_to_save="auto" if config.modules_to_save == "auto" else [exactly(name) for name in saved],
    )
