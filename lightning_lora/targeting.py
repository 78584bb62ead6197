"""From a config to the modules it means, and the report that explains the choice.

Everything that can be wrong with a config for a model is found here, before anything is changed: a pattern that hits
nothing (with the nearest names), a module of a type that cannot be adapted, a rank above what a layer can have.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from lightning_lora.config import ALL_LINEAR, LoRAConfig
from lightning_lora.layers.base import PREFIX, LoRALayer, refusal
from lightning_lora.names import clean_name, modules_by_name
from lightning_lora.patterns import Pattern, compile_pattern, compile_patterns, layer_index
from lightning_lora.registry import kind_of

T = TypeVar("T")

_FRESH_HEAD = re.compile(r"For\w*(Classification|MultipleChoice|QuestionAnswering)$")
_READS_WEIGHTS = {nn.TransformerEncoderLayer: ("linear1", "linear2")}


@dataclass(frozen=True)
class Target:
    """One module to adapt."""

    fqn: str
    module: nn.Module = field(repr=False)
    type_name: str  # the module's type before it is adapted
    kind: type[LoRALayer]
    rank: int
    alpha: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base weight."""
        return tuple(self.module.weight.shape)  # type: ignore[arg-type]

    @property
    def parameters(self) -> int:
        """Elements that the adapter has."""
        return sum(math.prod(shape) for shape in self.kind.adapter_shapes(self.module, self.rank))


@dataclass(frozen=True)
class TargetReport:
    """What a config means for a model; ``print`` it.

    Attributes:
        targets: the modules to adapt, in the model's order.
        hits: pattern → how many modules it hit, by config field.
        saved: FQNs of the modules trained in full.
    """

    targets: tuple[Target, ...]
    hits: dict[str, dict[str, int]]
    saved: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Elements that all adapters have together."""
        return sum(target.parameters for target in self.targets)

    def __str__(self) -> str:
        groups: Counter[tuple[str, ...]] = Counter()
        parameters: Counter[tuple[str, ...]] = Counter()
        for target in self.targets:
            shape = "×".join(map(str, target.shape))
            row = (re.sub(r"\.\d+\.", ".*.", target.fqn), target.type_name, shape, str(target.rank), f"{target.alpha:g}")
            groups[row] += 1
            parameters[row] += target.parameters
        rows: list[tuple[str, ...]] = [("module", "type", "weight", "rank", "alpha", "count", "parameters")]
        rows += [(*row, str(count), f"{parameters[row]:,}") for row, count in groups.items()]
        lines: list[str] = []
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.rjust(w) if i > 2 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        lines.append(f"LoRA on {len(self.targets)} modules, {self.parameters:,} parameters")
        lines += [f"  {name} {pattern!r}: {count} modules" for name, hits in self.hits.items() for pattern, count in hits.items()]
        if self.saved:
            lines.append(f"trained in full: {', '.join(self.saved)}")
        return "\n".join(line.rstrip() for line in lines)


def find_targets(model: nn.Module, config: LoRAConfig) -> TargetReport:
    """Resolve a config against a model without changing it.

    Args:
        model: any module without LoRA.
        config: what to adapt.

    Raises:
        ValueError: a pattern or layer index hits nothing, a target cannot be adapted, two fields contradict each other.
    """
    # A module that two parents share has two names: either may be targeted, and it is adapted once.
    modules = {name: module for name, module in modules_by_name(model).items() if not name.rpartition(".")[2].startswith(PREFIX)}
    saved = saved_modules(model, config)
    excluded = compile_patterns(config.exclude_modules, "exclude_modules")
    heads = _output_heads(model) if config.target_modules == ALL_LINEAR else set()

    hits: dict[str, Counter[str]] = {
        "target_modules": Counter(),
        "exclude_modules": Counter(),
        "rank_pattern": Counter(),
        "alpha_pattern": Counter(),
    }
    patterns = () if config.target_modules == ALL_LINEAR else compile_patterns(config.target_modules, "target_modules")
    chosen: dict[str, nn.Module] = {}
    taken: set[nn.Module] = set()
    indices: Counter[int] = Counter()
    for fqn, module in modules.items():
        if config.target_modules == ALL_LINEAR:
            kind = kind_of(module)
            matched = [ALL_LINEAR] if kind is not None and kind.is_linear and module not in heads and not _within(fqn, saved) else []  # type: ignore[attr-defined]
        else:
            matched = [pattern.text for pattern in patterns if pattern.matches(fqn)]
        skipped = [pattern.text for pattern in excluded if pattern.matches(fqn)]
        hits["exclude_modules"].update(skipped)
        hits["target_modules"].update(matched)
        index = layer_index(fqn)
        if not matched or skipped or (config.layers is not None and index not in config.layers):
            continue
        if index is not None:
            indices[index] += 1
        if module not in taken:
            taken.add(module)
            chosen[fqn] = module

    ranks = [(compile_pattern(name, "rank_pattern"), rank) for name, rank in config.rank_pattern.items()]
    alphas = [(compile_pattern(name, "alpha_pattern"), alpha) for name, alpha in config.alpha_pattern.items()]
    targets, problems = [], []
    for fqn, module in chosen.items():
        rank = _first(ranks, fqn, config.rank, hits["rank_pattern"])
        alpha = _first(alphas, fqn, config.alpha, hits["alpha_pattern"])
        problem = _problem(modules.get(fqn.rpartition(".")[0], model), fqn, module, rank, config, saved)
        if problem:
            problems.append(problem)
        else:
            kind = kind_of(module)
            assert kind is not None
            targets.append(Target(fqn, module, type(module).__name__, kind, rank, alpha))

    wanted = {
        "target_modules": [ALL_LINEAR] if config.target_modules == ALL_LINEAR else [p.text for p in patterns],
        "exclude_modules": [p.text for p in excluded],
        "rank_pattern": list(config.rank_pattern),
        "alpha_pattern": list(config.alpha_pattern),
    }
    unmatched = [(name, text) for name, texts in wanted.items() for text in texts if not hits[name][text]]
    if unmatched and not (config.allow_unmatched and targets):
        problems += [_nothing(name, text, modules) for name, text in unmatched]
    missing = [index for index in config.layers or () if not indices[index]]
    if missing and not (config.allow_unmatched and targets):
        there = sorted({i for i in map(layer_index, modules) if i is not None})
        problems.append(f"layers={missing}: no targeted module sits in a block with that index; this model's indices are {_ranges(there)}.")
    if problems:
        raise ValueError("\n".join(problems[:8] + ([f"… and {len(problems) - 8} more."] if len(problems) > 8 else [])))
    if not targets:
        raise ValueError("target_modules and exclude_modules together leave no module to adapt; exclude less.")
    for target in targets:
        out_in = [math.prod(shape) // target.rank for shape in target.kind.adapter_shapes(target.module, target.rank)]
        if target.rank > min(out_in):
            warnings.warn(
                f"rank={target.rank} of {target.fqn!r} is above min(in, out)={min(out_in)}: more parameters than a full update.",
                stacklevel=3,
            )
    used = {name: {text: hits[name][text] for text in texts} for name, texts in wanted.items() if texts}
    return TargetReport(tuple(targets), used, tuple(saved))


def fresh_heads(model: nn.Module) -> list[str]:
    """FQNs of the heads that Hugging Face classification models start untrained: what stands beside the backbone.

    Recognised by the class name (``…ForSequenceClassification`` and the like), without importing transformers.
    """
    heads = []
    for fqn, module in model.named_modules():
        backbone = getattr(type(module), "base_model_prefix", None)
        if isinstance(backbone, str) and _FRESH_HEAD.search(type(module).__name__) and hasattr(module, backbone):
            own = [name for name, child in module.named_children() if name != backbone and any(True for _ in child.parameters())]
            heads += [clean_name(f"{fqn}.{name}" if fqn else name) for name in own]
    return heads


def saved_modules(model: nn.Module, config: LoRAConfig) -> list[str]:
    """FQNs of the modules that ``config.modules_to_save`` trains in full.

    Raises:
        ValueError: an entry matches nothing, or a module without parameters.
    """
    modules = modules_by_name(model)
    if config.modules_to_save == "auto":
        return fresh_heads(model)
    saved: list[str] = []
    for pattern in compile_patterns(config.modules_to_save, "modules_to_save"):
        found = [fqn for fqn in modules if pattern.matches(fqn)]
        if not found and not config.allow_unmatched:
            raise ValueError(_nothing("modules_to_save", pattern.text, modules))
        empty = [fqn for fqn in found if not any(True for _ in modules[fqn].parameters())]
        if empty:
            raise ValueError(
                f"modules_to_save: {empty[0]!r} ({type(modules[empty[0]]).__name__}) has no parameters to train; name another module."
            )
        saved += found
    saved = list(dict.fromkeys(saved))
    _check_not_tied(model, saved)
    return saved


def _check_not_tied(model: nn.Module, saved: list[str]) -> None:
    """A module trained in full takes along whatever shares its weight: nobody means that without saying so."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(clean_name(name))
    for tied in names.values():
        inside = [name for name in tied if _within(name, saved)]
        if inside and len(inside) < len(tied):
            outside = next(name for name in tied if name not in inside)
            raise ValueError(
                f"modules_to_save: {inside[0]} is tied to {outside}, which would train along; name both modules, or untie them first."
            )


def hf_ends(module: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The input and the output embeddings that a Hugging Face model names; None where it has none."""
    ends = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            ends.append(getattr(module, getter)())
        except (AttributeError, NotImplementedError):  # how transformers says "none" for models without text
            ends.append(None)
    return ends[0], ends[1]


def _output_heads(model: nn.Module) -> set[nn.Module]:
    """The output embeddings that Hugging Face models name, which "all-linear" leaves alone."""
    heads = (hf_ends(module)[1] for module in model.modules() if hasattr(type(module), "get_output_embeddings"))
    return {head for head in heads if head is not None}


def _problem(parent: nn.Module, fqn: str, module: nn.Module, rank: int, config: LoRAConfig, saved: list[str]) -> str | None:
    for owner, names in _READS_WEIGHTS.items():
        if isinstance(parent, owner) and fqn.rpartition(".")[2] in names:
            reads = f"nn.{owner.__name__} reads this weight without calling the layer in evaluation"
            return f"{fqn!r}: {reads}, so an adapter would be ignored there; exclude it."
    if _within(fqn, saved):
        return f"{fqn!r} is both in target_modules and in modules_to_save; it can be adapted or trained in full, not both."
    return refusal(module, fqn, rank, config.dropout)


def _nothing(name: str, text: str, modules: dict[str, nn.Module]) -> str:
    adaptable = [fqn for fqn, module in modules.items() if kind_of(module) is not None] or list(modules)
    short = dict.fromkeys(fqn.rpartition(".")[2] for fqn in adaptable)
    near = difflib.get_close_matches(text.rpartition(".")[2], list(short), n=4, cutoff=0.5) or list(short)[:8]
    hint = f" A single string is a regex over the whole name; for a plain name give a list: [{text!r}]." if text in short else ""
    names = ", ".join(near) or "none"
    return f"{name}: {text!r} matches no module. Nearest names: {names}.{hint} (allow_unmatched=True accepts it beside others.)"


def _first(rules: Iterable[tuple[Pattern, T]], fqn: str, default: T, hits: Counter[str]) -> T:
    matching = [(pattern.text, value) for pattern, value in rules if pattern.matches(fqn)]
    hits.update(text for text, _ in matching)
    return matching[0][1] if matching else default


def _within(fqn: str, parents: Iterable[str]) -> bool:
    return any(fqn == parent or fqn.startswith(parent + ".") for parent in parents)


def _ranges(numbers: list[int]) -> str:
    return (
        "none"
        if not numbers
        else f"{numbers[0]}–{numbers[-1]}"
        if numbers == list(range(numbers[0], numbers[-1] + 1))
        else ", ".join(map(str, numbers))
    )
