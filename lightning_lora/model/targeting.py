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
from lightning_lora.layers.spec import LayerSpec, options_of
from lightning_lora.model.heads import output_heads, saved_modules, within
from lightning_lora.quantization.formats import elements, format_of
from lightning_lora.registry import kind_of, why_refused
from lightning_lora.utils.names import modules_by_name
from lightning_lora.utils.patterns import compile_patterns, layer_index, no_match

_MUCH = 0.2  # of the model's elements: a warning says what is passed over
_READS_WEIGHTS = {nn.TransformerEncoderLayer: ("linear1", "linear2")}


@dataclass(frozen=True)
class Target:
    """One module to adapt."""

    fqn: str
    module: nn.Module = field(repr=False)
    type_name: str  # the module's type before it is adapted
    kind: type[LoRALayer]  # the class that it gets
    spec: LayerSpec

    @property
    def rank(self) -> int:
        """r of its adapter."""
        return self.spec.rank

    @property
    def alpha(self) -> float:
        """Scaling numerator of its adapter."""
        return self.spec.alpha

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base weight; of the first one where there are several."""
        return self.shapes[0]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of each base weight."""
        if format_of(self.module):
            return [(self.module.out_features, self.module.in_features)]  # type: ignore
        return [tuple(self.module._parameters[name].shape) for name in self.kind.adapted]  # type: ignore[union-attr]

    @property
    def parameters(self) -> int:
        """Elements that the adapter has."""
        return sum(math.prod(shape) for shape in self.kind.parameter_shapes(self.module, self.spec).values())


@dataclass(frozen=True)
class TargetReport:
    """What a config means for a model; ``print`` it.

    Attributes:
        targets: the modules to adapt, in the model's order.
        hits: pattern → how many modules it hit, by config field.
        saved: FQNs of the modules trained in full.
        left_out: what ``"all-linear"`` passes over because it is neither linear, embedding nor vector, such as experts in one tensor:
            module and type → elements.
        total: elements of the model.
    """

    targets: tuple[Target, ...]
    hits: dict[str, dict[str, int]]
    saved: tuple[str, ...]
    left_out: dict[str, int]
    total: int

    @property
    def parameters(self) -> int:
        """Elements that all adapters have together."""
        return sum(target.parameters for target in self.targets)

    def __str__(self) -> str:
        groups: Counter[tuple[str, ...]] = Counter()
        parameters: Counter[tuple[str, ...]] = Counter()
        for target in self.targets:
            shape = ", ".join("×".join(map(str, each)) for each in target.shapes)
            row = (_any_layer(target.fqn), target.type_name, shape, str(target.rank), f"{target.alpha:g}")
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
        if self.saved:
            lines.append(f"trained in full: {', '.join(self.saved)}")
        lines += [f"left out: {name}, {size:,} elements, {size / self.total:.0%} of the model" for name, size in self.left_out.items()]
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
    """``target_modules="all-linear"``: every linear but output heads and what is trained in full."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], saved: list[str]) -> None:
        self.name, self.hits = "target_modules", Counter({ALL_LINEAR: 0})
        heads = output_heads(model)
        kinds = {fqn: kind_of(type(module)) for fqn, module in modules.items() if module not in heads and not within(fqn, saved)}
        self.linears = {fqn for fqn, kind in kinds.items() if kind is not None and kind.is_linear}  # type: ignore[attr-defined]

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
    everything = config.target_modules == ALL_LINEAR
    wanted = _AllLinear(model, modules, saved) if everything else _Field("target_modules", config.target_modules)
    excluded = _Field("exclude_modules", config.exclude_modules)
    rules = {name: _Field(name, list(getattr(config, name))) for name in ("rank_pattern", "alpha_pattern", "kind_pattern")}
    options_of(config)  # a wrong one is refused here

    chosen: dict[nn.Module, str] = {}  # a module that two parents share has two names: either may be targeted, it is adapted once
    for fqn, module in modules.items():
        matched, skipped = wanted.matching(fqn), excluded.matching(fqn)
        if matched and not skipped and (config.layers is None or layer_index(fqn) in config.layers):
            chosen.setdefault(module, fqn)

    targets, problems = [], []
    for module, fqn in chosen.items():
        rank = next((config.rank_pattern[text] for text in rules["rank_pattern"].matching(fqn)), config.rank)
        alpha = next((config.alpha_pattern[text] for text in rules["alpha_pattern"].matching(fqn)), config.alpha)
        kind_name = next((config.kind_pattern[text] for text in rules["kind_pattern"].matching(fqn)), None)
        spec = LayerSpec(config, rank, alpha, fqn, kind_name)
        problem = _problem(modules.get(fqn.rpartition(".")[0], model), module, spec, saved)
        kind = adapted_class(type(module), config.variant, kind_name)
        if problem or kind is None:
            problems.append(problem or why_refused(module, fqn))
        else:
            targets.append(Target(fqn, module, type(module).__name__, kind, spec))

    fields = (wanted, excluded, *rules.values())
    if not (config.allow_unmatched and targets):
        problems += _unmatched(fields, config, modules, chosen.values())
    if problems:
        raise ValueError("\n".join(problems[:8] + ([f"… and {len(problems) - 8} more."] if len(problems) > 8 else [])))
    if not targets:
        raise ValueError("target_modules and exclude_modules together leave no module to adapt; exclude less.")
    for target in targets:
        _warn_of_rank(target)
    total = sum({p: elements(module, name, p) for module in modules.values() for name, p in _own_parameters(module)}.values())
    left = _left_out({fqn: m for fqn, m in modules.items() if not excluded.matching(fqn) and not within(fqn, saved)}) if everything else {}
    _warn_of_left_out(left, total)
    return TargetReport(tuple(targets), {each.name: dict(each.hits) for each in fields if each.hits}, tuple(saved), left, total)


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


def _problem(parent: nn.Module, module: nn.Module, spec: LayerSpec, saved: list[str]) -> str | None:
    fqn = spec.fqn
    for owner, names in _READS_WEIGHTS.items():
        if isinstance(parent, owner) and fqn.rpartition(".")[2] in names:
            reads = f"nn.{owner.__name__} reads this weight without calling the layer in evaluation"
            return f"{fqn!r}: {reads}, so an adapter would be ignored there; exclude it."
    if within(fqn, saved):
        return f"{fqn!r} is both in target_modules and in modules_to_save; it can be adapted or trained in full, not both."
    return refusal(module, spec)


def _warn_of_rank(target: Target) -> None:
    sizes = [math.prod(shape) // target.rank for shape in target.kind.adapter_shapes(target.module, target.spec)]
    if target.rank > min(sizes):
        warnings.warn(
            f"rank={target.rank} of {target.fqn!r} is above min(in, out)={min(sizes)}: more parameters than a full update.", stacklevel=4
        )


def _left_out(modules: dict[str, nn.Module]) -> dict[str, int]:
    """Elements by module and type of what "all-linear" passes over; vectors (norms, biases) and embeddings are no news."""
    left: Counter[str] = Counter()
    for fqn, module in modules.items():
        kind = kind_of(type(module))
        if not isinstance(module, nn.Embedding) and not (kind is not None and kind.is_linear):  # type: ignore[attr-defined]
            sizes = [parameter.numel() for _, parameter in _own_parameters(module) if parameter.ndim > 1]
            if sizes:
                base = getattr(type(module), "lora_base", type(module))
                left[f"{_any_layer(fqn) or 'the model itself'} ({base.__name__})"] += sum(sizes)
    return dict(left.most_common())


def _warn_of_left_out(left: dict[str, int], total: int) -> None:
    size = sum(left.values())
    if size > _MUCH * total:
        name = next(iter(left))
        warnings.warn(
            f"target_modules='all-linear' leaves out {size / total:.0%} of the model, which is in no linear: {name} has {left[name]:,} of"
            f" {total:,} elements. Name it in target_modules if LoRA has a kind for it, or in exclude_modules if that is meant.",
            stacklevel=3,
        )


def _own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The module's own, without children's and adapters'."""
    return [(name, p) for name, p in module._parameters.items() if p is not None and not name.startswith(PREFIX)]


def _any_layer(fqn: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", fqn)


def _ranges(numbers: list[int]) -> str:
    return (
        "none"
        if not numbers
        else f"{numbers[0]}–{numbers[-1]}"
        if numbers == list(range(numbers[0], numbers[-1] + 1))
        else ", ".join(map(str, numbers))
    )
