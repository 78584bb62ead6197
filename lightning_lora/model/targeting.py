"""Resolve a config to the modules of a model.

Every mistake in a config is found here, before the model is changed: a pattern without a match (the message has the nearest
names), a module that cannot be adapted, a rank above a layer's size.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lora.config import ALL_LINEAR, LoRAConfig, checked_config
from lightning_lora.layers.adapting import refusal
from lightning_lora.layers.base import PREFIX, LoRALayer
from lightning_lora.layers.classes import adapted_class
from lightning_lora.layers.several_weights import SeveralWeights
from lightning_lora.layers.spec import LayerSpec, Slices, check_options
from lightning_lora.model.frozen_parts import frozen_copies, mixed_with_frozen
from lightning_lora.model.fused_slices import chosen_slices, names_of, slice_names
from lightning_lora.model.heads import saved_modules, within
from lightning_lora.model.suitability import Suitability
from lightning_lora.model.target_fields import AllLinear, Field, children_too, excluded_around
from lightning_lora.model.target_report import Target, TargetReport, left_out, lines_of, no_target_of, own_parameters, warn_of_left_out
from lightning_lora.model.token_rows import token_row_targets
from lightning_lora.quantization.content import lost_factors
from lightning_lora.quantization.formats import elements
from lightning_lora.registry import KIND_NAMES, belongs_to_packed_base, kind_of, qualified_name, why_refused
from lightning_lora.utils.names import modules_by_name, parameters_by_name
from lightning_lora.utils.patterns import compile_pattern, layer_index, no_match, starred


def find_targets(model: nn.Module, config: LoRAConfig) -> TargetReport:
    """Resolve a config against a model without changing it.

    Args:
        model: any module. Layers that already have LoRA are targets as well.
        config: the config to resolve.

    Raises:
        ValueError: a pattern or a layer index matches nothing, a target cannot be adapted, or two fields contradict each other.

    Examples:
        >>> print(find_targets(model, LoRAConfig(rank=4)))
        module                           type    weight  rank  alpha  count  parameters
        model.layers.*.self_attn.q_proj  Linear  32×32      4     16      2         512
        model.layers.*.self_attn.v_proj  Linear  32×32      4     16      2         512
        LoRA on 4 modules, 1,024 parameters
        reached: 4,096 of 21,664 elements of the model, 19%
          target_modules 'q_proj': 2 modules
          target_modules 'v_proj': 2 modules
    """
    report = resolve(model, config)
    if belongs_to_packed_base(config.init):
        for target in report.targets:
            _check_lost(target, config.init)
    return report


def resolve(model: nn.Module, config: LoRAConfig, *, frozen_parts: bool = False) -> TargetReport:
    """Do as :func:`find_targets`. With ``frozen_parts``, accept targets in parts that the user froze as a whole."""
    config = checked_config(config)
    modules = {name: module for name, module in modules_by_name(model).items() if not name.rpartition(".")[2].startswith(PREFIX)}
    saved = saved_modules(model, config)
    suitability = Suitability(model)
    everything = config.target_modules == ALL_LINEAR
    wanted = AllLinear(model, modules, saved, suitability, config) if everything else Field("target_modules", config.target_modules)
    passed_over = wanted.passed_over if isinstance(wanted, AllLinear) else {}
    excluded = Field("exclude_modules", config.exclude_modules)
    rules = {name: Field(name, list(getattr(config, name))) for name in ("rank_pattern", "alpha_pattern", "kind_pattern")}
    check_options(config)
    out = {module for fqn, module in modules.items() if excluded.matching(fqn)}
    chosen, slices = _chosen(config, modules, out, wanted, excluded)
    with_parent = {f"{fqn}.{name}" for module, fqn in chosen.items() for name in children_too(module)}
    targets, problems = [], []
    for module, fqn in chosen.items():
        if fqn in with_parent:
            continue
        names = names_of(fqn, slices.get(module))
        kind_name = next((config.kind_pattern[text] for text in rules["kind_pattern"].matching(fqn)), None)
        kind = adapted_class(type(module), config.variant, kind_name, sliced=module in slices)
        alphas = rules["alpha_pattern"].values(config.alpha_pattern, names, fqn, config.alpha)
        ranks = rules["rank_pattern"].values(config.rank_pattern, names, fqn, None)
        try:
            ranks = [rank or kind.default_rank(module, config, model) for rank in ranks] if kind is not None else [config.rank]
        except ValueError as error:
            problems.append(f"{fqn!r} ({qualified_name(type(module))}): {error}.")
            continue
        if len({*ranks}) > 1 or len({*alphas}) > 1:
            problems.append(f"{', '.join(names)} are slices of {fqn!r}, and share one rank and alpha; the patterns give {ranks}, {alphas}.")
        spec = LayerSpec(config, ranks[0], alphas[0], fqn, kind_name, slices.get(module))
        problem = _problem(suitability, modules, module, spec, saved)
        if problem or kind is None:
            problems.append(problem or why_refused(module, fqn))
        else:
            targets.append(Target(fqn, module, type(module).__name__, kind, spec))
            children = [child for child in _children(module, spec) if child.module not in out]
            problems += filter(None, (refusal(child.module, child.spec) for child in children))
            targets += children

    rows, wrong = token_row_targets(model, config, modules, chosen, saved, suitability)
    problems += wrong
    adapted = {target.fqn: target.module for target in targets}
    copies = frozen_copies(model, adapted | {target.fqn: target.module for target in rows}, saved, config)
    problems += [] if frozen_parts else mixed_with_frozen(model, adapted, copies)
    fields = (wanted, excluded, *rules.values())
    if everything and passed_over and not chosen:
        problems += [f"target_modules='{ALL_LINEAR}' finds no linear that LoRA can adapt: {line}." for line in lines_of(passed_over)]
    elif not (config.allow_unmatched and targets):
        problems += _unmatched(fields, config, modules, chosen.values())
        problems += excluded_around(excluded, wanted, modules, chosen.values())
    unused = [name for name in config.kind_options if not any(issubclass(target.kind, KIND_NAMES[name]) for target in targets)]
    if unused and not problems and not config.allow_unmatched:
        problems.append(no_target_of(unused[0], modules, passed_over))
    _check(problems, model, targets)
    for target in targets:
        _warn_of_rank(target)
    total = sum({p: elements(module, name, p) for module in modules.values() for name, p in own_parameters(module)}.values())
    rest = {fqn: module for fqn, module in modules.items() if module not in out and not within(fqn, saved)}
    if everything:
        left = left_out(rest, passed_over)
        warn_of_left_out(left, total, passed_over)
    else:
        left = left_out({fqn: rest[fqn] for fqn in _several_weights(rest) if rest[fqn] not in chosen}, rest)
    hits = {each.name: dict(each.hits) for each in fields if each.hits}
    return TargetReport(tuple(targets), hits, tuple(saved), left, total, passed_over, tuple(rows), copies)


def _chosen(
    config: LoRAConfig, modules: dict[str, nn.Module], out: Container[nn.Module], wanted: Field | AllLinear, excluded: Field
) -> tuple[dict[nn.Module, str], dict[nn.Module, Slices]]:
    """Return module → FQN of what is targeted, wholly or in slices, in the model's order; and module → its slices.

    A module with two parents has two names. It is adapted once even if both are targets, and not at all if one of them is excluded.
    """
    whole: dict[nn.Module, str] = {}
    for fqn, module in modules.items():
        if wanted.matching(fqn) and module not in out and (config.layers is None or layer_index(fqn) in config.layers):
            whole.setdefault(module, fqn)
    found = chosen_slices(modules, whole, wanted.matching, excluded.matching)
    slices = {module: each for module, each in found.items() if module in whole or (module not in out and _inside(config, modules, module))}
    chosen = {module: fqn for fqn, module in reversed(modules.items()) if module in whole or module in slices}
    return {module: fqn for module, fqn in reversed(chosen.items()) if module not in slices or slices[module].names}, slices


def _children(module: nn.Module, spec: LayerSpec) -> Iterator[Target]:
    """Yield the children that are adapted together with a module."""
    for name in children_too(module):
        child, fqn = module.get_submodule(name), f"{spec.fqn}.{name}"
        kind: Any = adapted_class(type(child), spec.config.variant)
        yield Target(fqn, child, type(child).__name__, kind, replace(spec, fqn=fqn))


def _check(problems: list[str], model: nn.Module, targets: Sequence[Target]) -> None:
    """Raise ValueError with what is wrong, or if nothing is left to adapt."""
    if problems:
        problems = _alike_together(problems)
        raise ValueError("\n".join(problems[:8] + ([f"… and {len(problems) - 8} more."] if len(problems) > 8 else [])))
    lazy = [name for name, parameter in parameters_by_name(model).items() if is_lazy(parameter)]
    if lazy:
        raise ValueError(f"{lazy[0]!r} is lazy and has no shape yet: run one forward pass before applying LoRA.")
    if not targets:
        raise ValueError("exclude_modules excludes every module that target_modules matches; exclude less.")


def _inside(config: LoRAConfig, modules: dict[str, nn.Module], module: nn.Module) -> bool:
    """Return whether a module is in a block that ``config.layers`` names."""
    return config.layers is None or any(layer_index(fqn) in config.layers for fqn, each in modules.items() if each is module)


def _several_weights(modules: dict[str, nn.Module]) -> list[str]:
    """Return the FQNs of modules that hold several projections as parameters, such as experts."""
    return [fqn for fqn, module in modules.items() if issubclass(kind_of(type(module)) or object, SeveralWeights)]


def _unmatched(fields: Iterable[Field], config: LoRAConfig, modules: dict[str, nn.Module], chosen: Iterable[str]) -> list[str]:
    """Return a problem per pattern and per layer index that matches nothing."""
    adaptable = slice_names(modules) + [fqn for fqn, module in modules.items() if kind_of(type(module)) is not None] or list(modules)
    unmatched = [(each.name, text) for each in fields for text, count in each.hits.items() if not count]
    problems = [_not_adapted(field, text, adaptable) or no_match(field, text, adaptable) for field, text in unmatched]
    if unmatched and (experts := _several_weights(modules)):
        short = experts[0].rpartition(".")[2]
        problems.append(f"{starred(experts[0])!r} holds its projections as parameters, which no pattern matches; target it by {short!r}.")
    hit = {layer_index(fqn) for fqn in chosen}
    missing = [index for index in config.layers or () if index not in hit]
    if missing:
        there = sorted({index for index in map(layer_index, modules) if index is not None})
        problems.append(f"layers={missing}: no targeted module is in a block with that index; this model's indices are {_ranges(there)}.")
    return problems


def _not_adapted(field: str, text: str, adaptable: Iterable[str]) -> str | None:
    """Return the problem of a table's pattern that matches a layer, but none that is adapted; None for other patterns."""
    there = next((fqn for fqn in adaptable if field.endswith("_pattern") and compile_pattern(text, field).matches(fqn)), None)
    if there is None:
        return None
    return (
        f"{field}: {text!r} matches {there!r}, which is not adapted: name it in target_modules too, or take the entry out."
        " (allow_unmatched=True accepts it beside others.)"
    )


def _problem(suitability: Suitability, modules: dict[str, nn.Module], module: nn.Module, spec: LayerSpec, saved: list[str]) -> str | None:
    fqn = spec.fqn
    if within(fqn, saved):
        return f"{fqn!r} is in both target_modules and modules_to_save; adapt it or train it in full, not both."
    problem = refusal(module, spec)
    if problem is None and (reason := suitability.reason(module, spec.kind, spec.config.variant)):
        parent, _, name = fqn.rpartition(".")
        together = parent in modules and name in children_too(modules[parent])
        fix = f"Target {parent!r}, which adapts it too" if together else "Exclude it"
        return f"{fqn!r} ({qualified_name(type(module))}): {reason}. {fix}."
    return problem


def _check_lost(target: Target, init: str) -> None:
    """Raise ValueError if nothing was kept of what quantizing a layer lost."""
    lost = lost_factors(target.module)
    if lost is None and not isinstance(target.module, LoRALayer):  # an adapted one has the values from its file
        raise ValueError(
            f"{target.fqn!r}: init={init!r} makes up for what quantizing lost, and this weight came quantized. Load the model in 16 bits,"
            " and quantize it with quantize_base(model, how, lora=config) or LoRACallback(quantize=...)."
        )
    if lost is not None and lost[0].shape[0] != target.rank:
        raise ValueError(
            f"{target.fqn!r}: rank={target.rank}, and its base was quantized for init={init!r} at rank={lost[0].shape[0]}; give that rank."
        )


def _alike_together(problems: list[str]) -> list[str]:
    """Return each sentence once, with the names of the other layers that it is about."""
    others: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for problem in problems:
        name, _, sentence = problem.partition(" ")
        if problem not in first.values() and first.setdefault(sentence, problem) != problem:
            others.setdefault(sentence, []).append(name.rstrip(":"))
    lines = []
    for sentence, problem in first.items():
        more = others.get(sentence, [])
        shown = ", ".join(more[:3]) + (f" and {len(more) - 3} more" if len(more) > 3 else "")
        lines.append(f"{problem} The same of {shown}." if more else problem)
    return lines


def _warn_of_rank(target: Target) -> None:
    rank, *sizes = target.kind.pair_sizes(target.module, target.spec)
    if rank > min(sizes):
        split = "" if rank == target.rank else f", {rank} in each of its {target.rank // rank} groups,"
        warnings.warn(
            f"rank={target.rank} of {target.fqn!r}{split} is above min(in, out)={min(sizes)}: more parameters than a full update; lower the"
            " rank.",
            stacklevel=5,
        )


def _ranges(numbers: list[int]) -> str:
    return (
        "none"
        if not numbers
        else f"{numbers[0]}–{numbers[-1]}"
        if numbers == list(range(numbers[0], numbers[-1] + 1))
        else ", ".join(map(str, numbers))
    )
