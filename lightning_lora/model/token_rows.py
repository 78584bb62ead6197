"""Resolve ``trainable_token_indices``: which modules get rows of their own, and which are tied to them and compute with the same rows.

As in PEFT 0.21: a list is for the input embedding. Modules that share the weight of a named embedding follow it. Where a config names
several modules of one weight with different rows, each gets its own, and nothing follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers import tied_rows, token_rows
from lightning_lora.layers.adapting import refusal
from lightning_lora.layers.classes import adapted_class
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.model.heads import hf_ends, within
from lightning_lora.model.suitability import Suitability
from lightning_lora.model.target_report import Target
from lightning_lora.model.ties import tied_weights
from lightning_lora.registry import qualified_name
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.patterns import compile_pattern, no_match

FIELD = "trainable_token_indices"


def token_row_targets(
    model: nn.Module,
    config: LoRAConfig,
    modules: Mapping[str, nn.Module],
    busy: Mapping[nn.Module, str],
    saved: list[str],
    suitability: Suitability,
) -> tuple[list[Target], list[str]]:
    """Return the layers of a config's token rows, the tied ones last, and what is wrong with them.

    Args:
        model: adapted or not; it does not change.
        config: its ``trainable_token_indices``.
        modules: FQN → module of the model, without its adapters.
        busy: module with a low-rank adapter → its FQN.
        saved: FQNs of what is trained in full.
        suitability: of the model's layers.
    """
    try:
        named = _named(model, config, modules)
        specs = {fqn: spec for names in _by_weight(modules, named) for fqn, spec in _specs(config, model, modules, named, names).items()}
    except ValueError as error:
        return [], [str(error)]
    targets, problems = [], []
    for fqn, spec in sorted(specs.items(), key=lambda each: bool(each[1].rows_of)):
        module = modules[fqn]
        if module in busy:
            with_rows = f"is tied to {spec.rows_of!r}, whose rows train" if spec.rows_of else "has rows that train"
            problems.append(f"{fqn!r} {with_rows} by {FIELD}, and an adapter by target_modules; the two are not combined, so choose one.")
        elif within(fqn, saved):
            problems.append(f"{fqn!r} is trained in full by modules_to_save, its rows too; leave it out there or in {FIELD}.")
        elif reason := refusal(module, spec):
            problems.append(reason)
        elif reason := suitability.reason(module):
            problems.append(f"{FIELD}: {fqn!r} ({qualified_name(type(module))}): {reason}.")
        else:
            kind: Any = adapted_class(type(module), config.variant, spec.kind)
            targets.append(Target(fqn, module, type(module).__name__, kind, spec))
    return targets, problems


def input_embedding(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    """Return the FQN of a model's input embedding: the one that a Hugging Face model names, or else its only one.

    Raises:
        ValueError: there is none, or there are several.
    """
    found: list[str] = []
    models: list[str] = []
    for name, module in model.named_modules():
        if not within(clean_name(name), models) and hasattr(type(module), "get_input_embeddings"):
            embedding = hf_ends(module)[0]
            if isinstance(embedding, nn.Embedding):
                models.append(clean_name(name))
                found.append(next(fqn for fqn, each in modules.items() if each is embedding))
    found = list(dict.fromkeys(found)) or [fqn for fqn, module in modules.items() if isinstance(module, nn.Embedding)]
    if len(found) != 1:
        there = f"this model has {', '.join(map(repr, found))}" if found else "this model has none"
        raise ValueError(f"{FIELD}: a list is for the input embedding, and {there}; give a mapping from its name to the list.")
    return found[0]


def _named(model: nn.Module, config: LoRAConfig, modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return FQN → rows of the modules that the config names. A module with two names has its first one."""
    said = config.trainable_token_indices
    if said is None:
        return {}
    if not isinstance(said, Mapping):
        return {input_embedding(model, modules): tuple(said)}
    first: dict[nn.Module, str] = {}
    for fqn, module in modules.items():
        first.setdefault(module, fqn)
    found: dict[str, tuple[int, ...]] = {}
    for text, rows in said.items():
        pattern = compile_pattern(text, FIELD)
        hits = list(dict.fromkeys(first[module] for fqn, module in modules.items() if pattern.matches(fqn)))
        if not hits:
            raise ValueError(no_match(FIELD, text, [fqn for fqn, module in modules.items() if isinstance(module, nn.Embedding)]))
        for fqn in hits:
            if found.setdefault(fqn, tuple(rows)) != tuple(rows):
                raise ValueError(f"{FIELD}: two entries give rows of {fqn!r}, {list(found[fqn])} and {list(rows)}; name it once.")
    return found


def _by_weight(modules: Mapping[str, nn.Module], named: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Return the named modules' FQNs, those that share a weight together."""
    groups: dict[int, list[str]] = {}
    for fqn in named:
        groups.setdefault(id(modules[fqn]._parameters.get("weight", fqn)), []).append(fqn)
    return list(groups.values())


def _specs(
    config: LoRAConfig, model: nn.Module, modules: Mapping[str, nn.Module], named: Mapping[str, tuple[int, ...]], names: list[str]
) -> dict[str, LayerSpec]:
    """Return FQN → spec of the modules of one weight.

    Raises:
        ValueError: the weight is shared with something whose rows cannot follow.
    """

    def spec(fqn: str, rows: tuple[int, ...], source: str = "") -> LayerSpec:
        return LayerSpec(config, len(rows), config.alpha, fqn, tied_rows.KIND if source else token_rows.KIND, None, rows, source)

    source = next((fqn for fqn in names if isinstance(modules[fqn], nn.Embedding)), names[0])
    weight = modules[source]._parameters.get("weight")
    if weight is None:
        return {source: spec(source, named[source])}  # refused, with the reason
    users: dict[nn.Module, str] = {}
    for fqn, module in modules.items():
        if module._parameters.get("weight") is weight:
            users.setdefault(module, fqn)
    others = {fqn for fqn in users.values() if fqn not in names}
    slots = {f"{fqn}.weight" for fqn, module in modules.items() if module in users}
    shared = [clean_name(name) for name in tied_weights(model, {f"{source}.weight": weight}).get(f"{source}.weight", ())]
    if odd := sorted(name for name in shared if name not in slots):
        raise ValueError(f"{FIELD}: the weight of {source!r} is also {odd[0]!r}, where its rows cannot follow.")
    alike = len({named[fqn] for fqn in names}) == 1
    if not isinstance(modules[source], nn.Embedding) or (not alike and not others):
        return {fqn: spec(fqn, named[fqn]) for fqn in names}
    if not alike:
        raise ValueError(
            f"{FIELD}: {', '.join(map(repr, names))} share a weight with {sorted(others)[0]!r} and name different rows; name the same rows."
        )
    return {fqn: spec(fqn, named[source], "" if fqn == source else source) for fqn in users.values()}
