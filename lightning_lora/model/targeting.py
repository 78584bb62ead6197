"""From a config to the modules it means, and the report that explains the choice.

Everything that can be wrong with a config for a model is found here, before anything is changed: a pattern that hits
nothing (with the nearest names), a module of a type that cannot be adapted, a rank above what a layer can have.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from lightning_lora.config import ALL_LINEAR, LoRAConfig
from lightning_lora.layers.adapting import refusal
from lightning_lora.layers.base import PREFIX, LoRALayer
from lightning_lora.layers.classes import adapted_class
from lightning_lora.model.frozen_parts import mixed_with_frozen
from lightning_lora.model.heads import output_heads, saved_modules, within
from lightning_lora.model.suitability import Suitability
from lightning_lora.quantization.formats import format_of
from lightning_lora.registry import kind_of, qualified_name, why_refused
from lightning_lora.utils.names import modules_by_name
from lightning_lora.utils.patterns import compile_patterns, layer_index, no_match


@dataclass(frozen=True)
class Target:
    """One module to adapt."""

    fqn: str
    module: nn.Module = field(repr=False)
    type_name: str  # the module's type before it is adapted
    kind: type[LoRALayer]  # the class that it gets
    rank: int
    alpha: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base weight."""
        shape = self.module.weight.shape
        return (self.module.out_features, self.module.in_features) if format_of(self.module) else tuple(shape)  # type: ignore

    @property
    def parameters(self) -> int:
        """Elements that the adapter has."""
        return sum(math.prod(shape) for shape in self.kind.parameter_shapes(self.module, self.rank).values())


@dataclass(frozen=True)
class TargetReport:
    """What a config means for a model; ``print`` it.

    Attributes:
        targets: the modules to adapt, in the model's order.
        hits: pattern → how many modules it hit, by config field.
        saved: FQNs of the modules trained in full.
        left_out: FQN → why ``target_modules="all-linear"`` passed over this linear.
    """

    targets: tuple[Target, ...]
    hits: dict[str, dict[str, int]]
    saved: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Elements that all adapters have together."""
        return sum(target.parameters for target in self.targets)

    def __str__(self) -> str:
        groups: Counter[tuple[str, ...]] = Counter()
        parameters: Counter[tuple[str, ...]] = Counter()
        for target in self.targets:
            shape = "×".join(map(str, target.shape))
            row = (_starred(target.fqn), target.type_name, shape, str(target.rank), f"{target.alpha:g}")
            groups[row] += 1
            parameters[row] += target.parameters
        rows: list[tuple[str, ...]] = [("module", "type", "weight", "rank", "alpha", "count", "parameters")]
        rows += [(*row, str(count), f"{parameters[row]:,}") for row, count in groups.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.rjust(w) if i > 2 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        lines.append(f"LoRA on {len(self.targets)} modules, {self.parameters:,} parameters")
        lines += [f"  {name} {pattern!r}: {count} modules" for name, hits in self.hits.items() for pattern, count in hits.items()]
        lines += [f"left out: {line}" for line in _grouped(self.left_out)]
        if self.saved:
            lines.append(f"trained in full: {', '.join(self.saved)}")
        return "\n".join(line.rstrip() for line in lines)


class _Field:
    """The patterns of one config field, and how many modules each hit."""

    def __init__(self, name: str, entries: str | Iterable[str]) -> None:
        self.name, self.patterns = name, compile_patterns(entries, name)
        self.hits = Counter({pattern.text: 0 for pattern in self.patterns})

    def matching(self, fqn: str) -> list[str]:
        """The entries that match a module, each counted."""
        found = [pattern.text for pattern in self.patterns if pattern.matches(fqn)]
        self.hits.update(found)
        return found


class _AllLinear(_Field):
    """``target_modules="all-linear"``: every linear but output heads, what is trained in full, and what an adapter cannot serve."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], saved: list[str], suitability: Suitability) -> None:
        self.name, self.hits = "target_modules", Counter({ALL_LINEAR: 0})
        heads = output_heads(model)
        kinds = {fqn: kind_of(type(module)) for fqn, module in modules.items() if module not in heads and not within(fqn, saved)}
        linears = [fqn for fqn, kind in kinds.items() if kind is not None and kind.is_linear]  # type: ignore[attr-defined]
        self.left_out = {fqn: reason for fqn in linears if (reason := suitability.reason(modules[fqn]))}
        self.linears = set(linears) - self.left_out.keys()

    def matching(self, fqn: str) -> list[str]:
        found = [ALL_LINEAR] if fqn in self.linears else []
        self.hits.update(found)
        return found


def find_targets(model: nn.Module, config: LoRAConfig) -> TargetReport:
    """Resolve a config against a model without changing it.

    Args:
        model: any module; layers that have LoRA already are found as if they had not.
        config: what to adapt.

    Raises:
        ValueError: a pattern or layer index hits nothing, a target cannot be adapted, two fields contradict each other.
    """
    modules = {name: module for name, module in modules_by_name(model).items() if not name.rpartition(".")[2].startswith(PREFIX)}
    saved = saved_modules(model, config)
    suitability = Suitability(model)
    everything = config.target_modules == ALL_LINEAR
    wanted = _AllLinear(model, modules, saved, suitability) if everything else _Field("target_modules", config.target_modules)
    left_out = wanted.left_out if isinstance(wanted, _AllLinear) else {}
    excluded = _Field("exclude_modules", config.exclude_modules)
    ranks, alphas = _Field("rank_pattern", list(config.rank_pattern)), _Field("alpha_pattern", list(config.alpha_pattern))

    chosen: dict[nn.Module, str] = {}  # a module that two parents share has two names: either may be targeted, it is adapted once
    for fqn, module in modules.items():
        matched, skipped = wanted.matching(fqn), excluded.matching(fqn)
        if matched and not skipped and (config.layers is None or layer_index(fqn) in config.layers):
            chosen.setdefault(module, fqn)

    targets, problems = [], []
    for module, fqn in chosen.items():
        rank = next((config.rank_pattern[text] for text in ranks.matching(fqn)), config.rank)
        alpha = next((config.alpha_pattern[text] for text in alphas.matching(fqn)), config.alpha)
        problem = _problem(suitability, fqn, module, rank, config, saved)
        kind = adapted_class(type(module), config.variant)
        if problem or kind is None:
            problems.append(problem or why_refused(module, fqn))
        else:
            targets.append(Target(fqn, module, type(module).__name__, kind, rank, alpha))

    problems += mixed_with_frozen(model, {target.fqn: target.module for target in targets})
    fields = (wanted, excluded, ranks, alphas)
    if everything and left_out and not chosen:
        problems += [f"target_modules='{ALL_LINEAR}' finds no linear that an adapter can serve: {line}." for line in _grouped(left_out)]
    elif not (config.allow_unmatched and targets):
        problems += _unmatched(fields, config, modules, chosen.values())
    if problems:
        raise ValueError("\n".join(problems[:8] + ([f"… and {len(problems) - 8} more."] if len(problems) > 8 else [])))
    if not targets:
        raise ValueError("target_modules and exclude_modules together leave no module to adapt; exclude less.")
    for target in targets:
        _warn_of_rank(target)
    return TargetReport(tuple(targets), {each.name: dict(each.hits) for each in fields if each.hits}, tuple(saved), left_out)


def _unmatched(fields: Iterable[_Field], config: LoRAConfig, modules: dict[str, nn.Module], chosen: Iterable[str]) -> list[str]:
    """What the config names that is not there."""
    adaptable = [fqn for fqn, module in modules.items() if kind_of(type(module)) is not None] or list(modules)
    problems = [no_match(each.name, text, adaptable) for each in fields for text, count in each.hits.items() if not count]
    hit = {layer_index(fqn) for fqn in chosen}
    missing = [index for index in config.layers or () if index not in hit]
    if missing:
        there = sorted({index for index in map(layer_index, modules) if index is not None})
        problems.append(f"layers={missing}: no targeted module sits in a block with that index; this model's indices are {_ranges(there)}.")
    return problems


def _problem(suitability: Suitability, fqn: str, module: nn.Module, rank: int, config: LoRAConfig, saved: list[str]) -> str | None:
    if within(fqn, saved):
        return f"{fqn!r} is both in target_modules and in modules_to_save; it can be adapted or trained in full, not both."
    problem = refusal(module, fqn, rank, config.dropout, config.variant)
    if problem is None and (reason := suitability.reason(module)):
        return f"{fqn!r} ({qualified_name(type(module))}): {reason}. Exclude it."
    return problem


def _starred(fqn: str) -> str:
    """With * for the index of a block, so that the layers of all blocks have one name."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", fqn)


def _grouped(reasons: dict[str, str]) -> list[str]:
    """One line for what all blocks have in common."""
    groups = Counter((_starred(fqn), reason) for fqn, reason in reasons.items())
    return [f"{name} ({count}): {reason}" for (name, reason), count in groups.items()]


def _warn_of_rank(target: Target) -> None:
    sizes = [math.prod(shape) // target.rank for shape in target.kind.adapter_shapes(target.module, target.rank)]
    if target.rank > min(sizes):
        warnings.warn(
            f"rank={target.rank} of {target.fqn!r} is above min(in, out)={min(sizes)}: more parameters than a full update.", stacklevel=4
        )


def _ranges(numbers: list[int]) -> str:
    return (
        "none"
        if not numbers
        else f"{numbers[0]}–{numbers[-1]}"
        if numbers == list(range(numbers[0], numbers[-1] + 1))
        else ", ".join(map(str, numbers))
    )
