"""Translate an adapter file to one model: its names, and its config.

Names that transformers has changed since are translated. For a folder that PEFT wrote, PEFT's own rules decide which modules are meant.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_lora.adapter_io.files import CONFIG, AdapterFile
from lightning_lora.adapter_io.peft_format import as_lora
from lightning_lora.adapter_io.peft_names import names_here, rebuilt
from lightning_lora.adapter_io.peft_rules import is_saved, is_target, is_target_parameter, pattern_value, saved_names
from lightning_lora.adapter_io.peft_stacks import Stack, is_stack, targeted_stacks, unstacked
from lightning_lora.adapter_io.peft_tying import saved_with_ties
from lightning_lora.adapter_io.single_experts import stacked
from lightning_lora.adapter_io.token_rows import ROWS, rows_of_file
from lightning_lora.config import ALL_LINEAR, LoRAConfig
from lightning_lora.layers.base import PREFIX
from lightning_lora.model.fused_slices import slice_names
from lightning_lora.model.heads import fresh_heads, within
from lightning_lora.model.suitability import Suitability
from lightning_lora.registry import kind_of
from lightning_lora.utils.names import modules_by_name
from lightning_lora.utils.patterns import compile_pattern, compile_patterns, exactly, layer_index


@dataclass(frozen=True)
class _Here:
    """The model to which a file is translated.

    Attributes:
        modules: name → module of the model.
        old: name of a module → its name in the file, where the two differ.
        dead: names of modules on which the file's adapter cannot act.
    """

    modules: dict[str, nn.Module]
    old: dict[str, str]
    dead: set[str]

    def either(self, fqn: str, rule: Callable[[str], bool]) -> bool:
        """Return whether a rule matches a module by its name here or in the file."""
        return rule(fqn) or (fqn in self.old and rule(self.old[fqn]))


def place(adapter: AdapterFile, root: nn.Module, where: str) -> AdapterFile:
    """Return a file's content with the names of this model. If PEFT wrote it, return a config that means the same on this model.

    Args:
        adapter: as it was read.
        root: the model that it is for, adapted or not.
        where: the file's path, for messages.

    Raises:
        ValueError: the file adapts tensors that are no layer's weight here, or no module at all.
    """
    modules = {name: module for name, module in modules_by_name(root).items() if PREFIX not in name}
    singles: dict[str, Stack] = {}
    if adapter.fields is not None:
        tensors, singles = stacked(adapter.tensors, modules, root, adapter.fields, where)
        adapter = replace(adapter, tensors=tensors)
    renamed = names_here(root, {name.rpartition(".")[0] for name in adapter.tensors} - {""}, modules)
    tensors = {}
    for name, tensor in adapter.tensors.items():
        owner, _, last = name.rpartition(".")
        if last.startswith(PREFIX) and owner not in modules and owner not in renamed and (reason := rebuilt(root, owner)):
            raise ValueError(f"{where}: {owner!r} is {reason} in this version of the model, where its LoRA has no place.")
        tensors[f"{renamed.get(owner, owner)}.{last}" if owner else name] = tensor
    if len(tensors) < len(adapter.tensors):
        raise ValueError(f"{where} has tensors of the same module under two names, an old and a new one ({next(iter(renamed))!r}).")
    stacks = {} if adapter.fields is None else targeted_stacks(as_lora(adapter.fields, where), modules)
    tensors = unstacked(tensors, modules, stacks, adapter.fields, where)
    adapter = replace(adapter, tensors=tensors)
    if adapter.fields is None:
        return adapter
    tensors, rows = rows_of_file(tensors, adapter.fields, root, modules, where)
    for fqn in _weights(as_lora(adapter.fields, where), modules, where):
        factors = [f"{fqn}.lora_{part}" for part in "AB"]
        if not isinstance(modules[fqn], nn.Linear) and all(name in tensors for name in factors):
            # PEFT multiplies by B·A in the weight's own shape, which is that of a linear's transposed.
            A, B = (tensors[name].t() for name in factors)
            tensors |= {factors[0]: B, factors[1]: A}
    dead = _dead(tensors, root, modules)
    tensors = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in dead}
    fields = as_lora(adapter.fields, where)
    beside = frozenset(name for name in tensors if not name.rpartition(".")[2].startswith(PREFIX))
    layers = {owner for owner, _, last in (name.rpartition(".") for name in tensors.keys() - beside) if last != ROWS} - {""}
    heads = [
        head
        for head in fresh_heads(root)
        if head in beside or (head in modules and {f"{head}.{name}" for name, _ in modules[head].named_parameters()} <= beside)
    ]
    fields |= {"modules_to_save": saved_with_ties(tensors, fields, layers, saved_names(fields), modules, where)}
    here = _Here(modules, {new: name for name, new in renamed.items()}, dead)
    config = replace(_meant(adapter.config, fields, layers, heads, here, singles, where), trainable_token_indices=rows)
    return replace(adapter, config=config, tensors=tensors, beside=beside)


def _meant(
    config: LoRAConfig, fields: dict[str, Any], layers: set[str], heads: list[str], here: _Here, singles: dict[str, Stack], where: str
) -> LoRAConfig:
    """Return the config that adapts here what PEFT adapts. It has the file's patterns if they match the same, else whole names.

    Args:
        config: what the JSON says without a model.
        fields: the JSON.
        layers: FQNs of the layers that the file has adapters for.
        heads: FQNs of fresh heads that the file has. They are trained in full, whatever the JSON says.
        here: the model's modules.
        singles: what the file says of experts one by one.
        where: the file's path, for messages.
    """
    stacks = targeted_stacks(fields, here.modules) | singles
    by_weight = _weights(fields, here.modules, where)
    names = fields.get("target_modules")
    rule = partial(is_target, fields if isinstance(names, str) else fields | {"target_modules": frozenset(names or ())})
    targets = by_weight | stacks.keys() | (layers if _unsaid(fields) else {fqn for fqn in here.modules if here.either(fqn, rule)})
    targets -= here.dead
    if here.old:  # the file's rules may match more modules today than the layers that were trained
        targets &= layers
    if not targets:
        raise ValueError(f"{where}: target_modules={names!r} names no module of this model.")
    if targets != _named(config, [*here.modules, *slice_names(here.modules)]):  # PEFT knows no slices
        config = replace(config, target_modules=[exactly(fqn) for fqn in sorted(targets)], exclude_modules=(), layers=None)
    save = partial(is_saved, fields["modules_to_save"])
    saved = [fqn for fqn, module in here.modules.items() if here.either(fqn, save) and any(True for _ in module.parameters())]
    saved = list(dict.fromkeys([*saved, *heads]))
    saved = [fqn for fqn in saved if not within(fqn.rpartition(".")[0], saved)]
    patterns = compile_patterns(config.modules_to_save, "modules_to_save")
    if set(saved) != {fqn for fqn in here.modules if any(pattern.matches(fqn) for pattern in patterns)}:
        config = replace(config, modules_to_save=[exactly(fqn) for fqn in saved])
    defaults: dict[str, Any] = {"rank_pattern": config.rank, "alpha_pattern": config.alpha}
    exact: dict[str, Any] = {}
    for name, default in defaults.items():
        said = fields.get(name)
        values = {fqn: pattern_value(said, f"{fqn}.weight" if fqn in by_weight else fqn, default) for fqn in targets}
        values |= {fqn: pattern_value(said, here.old[fqn], values[fqn]) for fqn in targets & here.old.keys()}
        values |= {fqn: getattr(stack, name) for fqn, stack in stacks.items()}
        ours = [(compile_pattern(text, name), value) for text, value in getattr(config, name).items()]
        if values != {fqn: next((value for pattern, value in ours if pattern.matches(fqn)), default) for fqn in targets}:
            exact[name] = {exactly(fqn): value for fqn, value in sorted(values.items()) if value != default}
    return replace(config, **exact)


def _dead(tensors: dict[str, Tensor], root: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """Return the layers on which no adapter can act and whose adapter in the file adds nothing.

    PEFT adapts layers whose weight is read without a call, such as the output projection of ``nn.MultiheadAttention``. Such an adapter
    never gets a gradient, so its B stays zero.
    """
    parts: dict[str, list[str]] = {}
    for name in tensors:
        owner, _, last = name.rpartition(".")
        parts.setdefault(owner, []).append(last)
    suitability = Suitability(root)
    idle = (fqn for fqn, names in parts.items() if sorted(names) == ["lora_A", "lora_B"] and not tensors[f"{fqn}.lora_B"].any())
    return {fqn for fqn in idle if fqn in modules and suitability.reason(modules[fqn])}


def _unsaid(fields: dict[str, Any]) -> bool:
    """Return whether the JSON leaves the choice of layers to PEFT. The file's tensors then determine the layers."""
    names = fields.get("target_modules")
    return (names is None and not fields.get("target_parameters")) or (isinstance(names, str) and names.lower() == ALL_LINEAR)


def _weights(fields: dict[str, Any], modules: dict[str, nn.Module], where: str) -> set[str]:
    """Return the linear layers and embeddings that ``target_parameters`` names by their weights."""
    found = set()
    for entry in fields.get("target_parameters") or ():
        alone = fields | {"target_parameters": [entry]}
        if not any(is_target_parameter(alone, f"{fqn}.{name}") for fqn, module in modules.items() for name in module._parameters):
            raise ValueError(
                f"{where}: {CONFIG} has target_parameters={fields['target_parameters']!r}, and {entry!r} names no layer's weight and no"
                " experts' of this model; LoRA on other tensors is not supported."
            )
    for fqn, module in modules.items():
        if is_stack(module):
            continue
        for name in module._parameters:
            if not is_target_parameter(fields, f"{fqn}.{name}"):
                continue
            kind: Any = kind_of(type(module))
            if name != "weight" or not (isinstance(module, (nn.Linear, nn.Embedding)) or (kind is not None and kind.transposed)):
                raise ValueError(
                    f"{where}: target_parameters={fields['target_parameters']!r}: {f'{fqn}.{name}'!r} is no linear layer's weight and no"
                    " embedding's; LoRA there is not supported."
                )
            found.add(fqn)
    return found


def _named(config: LoRAConfig, modules: Collection[str]) -> set[str]:
    """Return the names of the modules that our own matching selects."""
    wanted, excluded = (
        compile_patterns(config.target_modules, "target_modules"),
        compile_patterns(config.exclude_modules, "exclude_modules"),
    )
    inside = [fqn for fqn in modules if config.layers is None or layer_index(fqn) in config.layers]
    hit = [fqn for fqn in inside if any(pattern.matches(fqn) for pattern in wanted)]
    return {fqn for fqn in hit if not any(pattern.matches(fqn) for pattern in excluded)}
