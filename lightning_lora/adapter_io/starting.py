"""Start training from an adapter on disk: the config that it trains with, and whether a user's own config agrees.

The adapter decides which layers it has, with which rank and formula. A user's config may leave that out. What it says must agree: an
adapter cannot be given another rank by a config.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lightning_lora.adapter_io.files import read_adapter
from lightning_lora.adapter_io.names_below import resolve_file
from lightning_lora.adapter_io.placing import place
from lightning_lora.adapter_io.size_limit import check_size
from lightning_lora.config import ALL_LINEAR, LoRAConfig
from lightning_lora.layers.spec import options_of
from lightning_lora.model.heads import saved_modules
from lightning_lora.model.quantize import before_quantizing
from lightning_lora.model.targeting import TargetReport, resolve
from lightning_lora.registry import data_of, has_start
from lightning_lora.utils.names import adapter_root, modules_by_name
from lightning_lora.utils.patterns import by_name, compile_pattern, exactly, is_regex

_DEFAULT = LoRAConfig()


def starting_config(model: nn.Module, path: str | Path, given: LoRAConfig) -> LoRAConfig:
    """Return the config with which an adapter on disk trains further on a model.

    Args:
        model: a model, adapted or not, or a LightningModule around one.
        path: an adapter folder (ours or PEFT's), or a checkpoint written under ``LoRACallback``.
        given: the user's config. Fields that have their default say nothing. ``dropout`` is the user's. ``init`` has no effect: an adapter
            of rank r that began with PiSSA or OLoRA is a plain one of rank 2r on disk, and ``rank=r`` with that init agrees with it.
            So does any rank with EVA, which chose the adapter's.

    Raises:
        ValueError: the adapter does not fit the model, or a field of ``given`` disagrees with it.
    """
    _, root = adapter_root(model)
    check_size(Path(path), root)
    adapter = place(read_adapter(path), root, str(path))
    init = {name: getattr(adapter.config, name) for name in ("init", "init_options")}
    adapter = replace(adapter, config=before_quantizing(adapter.config))  # the base that it belongs to may be quantized after this
    try:
        plain, report = resolve_file(root, adapter)
    except ValueError as error:
        raise ValueError(f"start_from={str(path)!r}: {error}") from error
    different = [f"{name}={mine!r} (the adapter has {theirs!r})" for name, mine, theirs in _conflicts(root, given, plain, report)]
    if different:
        raise ValueError(
            f"start_from={str(path)!r} does not fit the config: {'; '.join(different)}. Leave these fields out to train the adapter as it"
            " is, or leave start_from out to train a new one."
        )
    dropout = adapter.config.dropout if given.dropout == _DEFAULT.dropout else given.dropout
    return replace(_named(replace(plain, **init), report, modules_by_name(root)), dropout=dropout)


def _named(config: LoRAConfig, report: TargetReport, modules: Collection[str]) -> LoRAConfig:
    """Return the config with the layers' names in place of regexes, which match no longer in a LightningModule around the model."""
    whole = isinstance(config.target_modules, str) and config.target_modules != ALL_LINEAR
    texts = [*config.rank_pattern, *config.alpha_pattern, *config.kind_pattern]
    rows = {t.fqn: list(t.spec.rows) for t in report.rows if not t.spec.rows_of}
    for part in (config.target_modules, config.exclude_modules, config.modules_to_save, _rows_by_name(config)):
        texts += [part] if isinstance(part, str) else part
    if not whole and not any(map(is_regex, texts)):
        return config
    ranks, alphas, kinds = ({fqn: getattr(t.spec, name) for t in report.targets for fqn in t.names} for name in ("rank", "alpha", "kind"))
    names = [*ranks]
    ends = {fqn for fqn in (*names, *rows) if any(other.endswith(f".{fqn}") for other in modules)}  # such a name means other modules too
    return replace(
        config,
        target_modules=[exactly(fqn) if fqn in ends else fqn for fqn in names],
        exclude_modules=(),
        layers=None,
        rank_pattern=by_name({fqn: rank for fqn, rank in ranks.items() if rank != config.rank}),
        alpha_pattern=by_name({fqn: alpha for fqn, alpha in alphas.items() if alpha != config.alpha}),
        kind_pattern=by_name({fqn: kind for fqn, kind in kinds.items() if kind is not None}),
        modules_to_save="auto" if config.modules_to_save == "auto" else list(report.saved),
        trainable_token_indices={exactly(fqn) if fqn in ends else fqn: own for fqn, own in rows.items()}
        if _rows_by_name(config)
        else config.trainable_token_indices,
    )


def _rows_by_name(config: LoRAConfig) -> Collection[str]:
    """Return the names by which a config gives modules rows of their own."""
    return config.trainable_token_indices if isinstance(config.trainable_token_indices, Mapping) else ()


def _conflicts(root: nn.Module, given: LoRAConfig, found: LoRAConfig, report: TargetReport) -> Iterator[tuple[str, Any, Any]]:
    """Yield field, the user's value and the adapter's for each field that the user set and that disagrees."""

    def is_set(*names: str) -> bool:
        return any(getattr(given, name) != getattr(_DEFAULT, name) for name in names)

    for name in ("variant", "scaling", "bias"):
        if is_set(name) and getattr(given, name) != getattr(found, name):
            yield name, getattr(given, name), getattr(found, name)
    if given.variant == found.variant and is_set("variant_options") and options_of(given) != options_of(found):
        yield "variant_options", given.variant_options, options_of(found)
    if is_set("kind_options") and given.kind_options != found.kind_options:
        yield "kind_options", given.kind_options, found.kind_options
    if is_set("modules_to_save") and set(saved := saved_modules(root, given)) != set(report.saved):
        yield "modules_to_save", sorted(saved), sorted(report.saved)
    rows = {t.fqn: t.spec.rows for t in report.rows}
    if is_set("trainable_token_indices"):
        own = replace(found, trainable_token_indices=given.trainable_token_indices)
        if {t.fqn: t.spec.rows for t in resolve(root, own, frozen_parts=True).rows} != rows:
            yield "trainable_token_indices", given.trainable_token_indices, found.trainable_token_indices
    theirs = {t.fqn: t for t in report.targets}
    kind = data_of(given.init)
    by_data = kind is not None and kind.decides_ranks(given)  # then ranks, and layers without one, say nothing
    if is_set("target_modules", "exclude_modules", "layers"):
        which = replace(_DEFAULT, **{name: getattr(given, name) for name in ("target_modules", "exclude_modules", "layers")}, rank=1)
        wanted = {fqn for t in resolve(root, which, frozen_parts=True).targets for fqn in t.names}
        here = {fqn for t in report.targets for fqn in t.names}
        if unlike := sorted(here - wanted if by_data else wanted ^ here):
            owner = "only the config" if unlike[0] in wanted else "only the adapter"
            yield "target_modules", given.target_modules, f"{len(theirs)} layers; {owner} has {unlike[0]}"
    doubled = has_start(given.init)  # a kept start doubles the rank in the file, not the scaling
    twice = given.scaling_of(1, 1) / given.scaling_of(2, 1)
    for name, patterns, factors in (("rank", "rank_pattern", (1, 2)), ("alpha", "alpha_pattern", (1, twice))):
        for fqn, target in theirs.items() if is_set(name, patterns) and not by_data else ():
            default = given.alpha if name == "alpha" else target.kind.default_rank(target.module, given, root)
            mine, other = _value(getattr(given, patterns), default, fqn), getattr(target, name)
            if not any(math.isclose(other, factor * mine) for factor in factors[: 1 + doubled]):
                yield f"{name} of {fqn}", mine, other
                break


def _value(patterns: Mapping[str, Any], default: Any, fqn: str) -> Any:
    """Return the value of the first pattern that matches a layer."""
    return next((value for text, value in patterns.items() if compile_pattern(text, "rank_pattern").matches(fqn)), default)
