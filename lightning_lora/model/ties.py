"""Find the weights that modules share, and give one of the modules a weight of its own.

Hugging Face models declare their ties: name of a weight → name of the weight that it is tied to. ``save_pretrained`` leaves out what is
declared as tied, and ``from_pretrained`` ties what it does not find. So a tie that a merge breaks must no longer be declared, and the
weight must be written under its own name. All other ties stay.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_lora.layers.base import PREFIX, lora_layers
from lightning_lora.model.plain_copy import plain_copy
from lightning_lora.utils.names import clean_name, join
from lightning_lora.utils.shared_memory import SharedMemory
from lightning_lora.utils.transformers_conventions import declare_ties, declared_ties, without_ties

Slot = tuple[nn.Module, str]  # a module and the name of its parameter; a module that two parents share has one slot under two names


def tied_weights(model: nn.Module, weights: Mapping[str, nn.Parameter] | None = None) -> dict[str, list[str]]:
    """Return name of a weight → names of the other parameters and buffers that are the same tensor, or share its memory.

    Args:
        model: a model with or without adapters.
        weights: name → weight to look up. Default: the adapted weights that are not merged.
    """
    if weights is None:
        weights = adapted_weights(model)
    memory = SharedMemory(
        (join(module_name, name), tensor)
        for module_name, module in model.named_modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    )
    tied = {}
    for name, weight in weights.items():
        others = [other for other in memory.names(weight) if other != name]
        if others:
            tied[name] = others
    return tied


def adapted_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name → weight of the adapted weights that are not merged yet. A weight whose users all have the same adapter is left out."""
    layers = {join(fqn, name): part for fqn, layer in lora_layers(model) for name, part in layer.by_weight().items()}
    return {name: part.weight for name, part in layers.items() if not part.merged and not part.followed}


@dataclass
class Untying:
    """The changes with which some tied weights are saved and loaded each under its own name.

    Attributes:
        copies: weights that were tied to one of them and to each other, and now need a copy each.
        configs: configs of Hugging Face models none of whose ties is left. Their ``tie_word_embeddings`` is switched off.
        declared: Hugging Face model → the ties that it still has, where some are left.
    """

    copies: list[Slot] = field(default_factory=list)
    configs: list[Any] = field(default_factory=list)
    declared: list[tuple[nn.Module, dict[str, str]]] = field(default_factory=list)
    _before: list[tuple[Slot, nn.Parameter]] | None = None
    _declared_before: list[tuple[nn.Module, Any]] = field(default_factory=list)

    def apply(self) -> None:
        """Make the changes. If they are made already, do nothing."""
        if self._before is not None:
            return
        shared = [(slot, tied) for slot in self.copies if (tied := slot[0]._parameters[slot[1]]) is not None]
        # First, because a lack of memory has to raise before any change.
        own = [nn.Parameter(tied.detach().clone(), requires_grad=tied.requires_grad) for _, tied in shared]
        for (module, name), parameter in zip((slot for slot, _ in shared), own, strict=True):
            module._parameters[name] = parameter
        self._before = shared
        for config in self.configs:
            config.tie_word_embeddings = False
        self._declared_before = [(model, declare_ties(model, ties)) for model, ties in self.declared]

    def undo(self) -> None:
        """Undo the changes. If none is made, do nothing."""
        for (module, name), tied in self._before or ():
            module._parameters[name] = tied
        for config in self.configs if self._before is not None else ():
            config.tie_word_embeddings = True
        for model, before in self._declared_before:
            declare_ties(model, before)
        self._before, self._declared_before = None, []


def untying(model: nn.Module, own: Collection[str]) -> Untying:
    """Return the changes that are needed when some tied weights get values of their own. Nothing is changed.

    Args:
        model: with or without adapters.
        own: names of the weights that get values of their own.

    Raises:
        ValueError: after the changes the model could not be saved and loaded without the tie.
    """
    slots, names = _slots(model)
    value: dict[str, Any] = {name: id(module._parameters[part]) for name, (module, part) in slots.items()}
    value.update({name: slot for name, slot in slots.items() if slot in {slots[clean_name(each)] for each in own}})
    plain, originals = plain_copy(model)
    found: dict[int, list[tuple[Any, nn.Module, str, dict[str, str]]]] = {}
    for prefix, module, ties in declared_ties(plain):  # asked of the plain copy: the patterns of some models match adapters too
        found.setdefault(id(module.config), []).append((originals[module].config, originals[module], prefix, ties))
    configs = {id(models[0][0]) for models in found.values()}
    plan, alone, still = Untying(), [], set()
    for models in found.values():
        pairs = {prefix + tied: prefix + source for _, _, prefix, ties in models for tied, source in ties.items()}
        pairs = {tied: source for tied, source in pairs.items() if tied in slots and source in slots}
        broken = [tied for tied, source in pairs.items() if value[tied] != value[source]]
        held = [tied for tied in pairs if tied not in broken]
        crowded = [tied for tied in broken if len(names[slots[tied]]) > 1]
        if not broken:
            continue
        without = without_ties(models[0][0], {type(module) for module in model.modules()}) if crowded or not held else None
        if without is not None:
            plan.configs += [config for config in without if config is models[0][0] or id(config) not in configs]
            alone += broken + [tied for tied in held if slots[tied] != slots[pairs[tied]]]
        elif crowded:
            other = next(name for name in names[slots[crowded[0]]] if name != crowded[0])
            raise ValueError(
                f"{crowded[0]} is tied to {pairs[crowded[0]]}, and {other} is the same weight: from_pretrained would tie it again, so the"
                " merged model cannot be saved. Leave it unmerged and call save_adapter."
            )
        else:
            plan.declared += [(owner, {t: s for t, s in ties.items() if prefix + t in held}) for _, owner, prefix, ties in models]
            alone += broken
            still |= set(held)
    for tied in alone:
        others = [name for name, other in value.items() if other == value[tied] and slots[name] != slots[tied] and name not in still]
        if others:
            plan.copies.append(slots[tied])
            value.update(dict.fromkeys(names[slots[tied]], slots[tied]))
    return plan


def _slots(model: nn.Module) -> tuple[dict[str, Slot], dict[Slot, set[str]]]:
    """Return name → slot and slot → names, of every parameter but the adapters'."""
    slots: dict[str, Slot] = {}
    names: dict[Slot, set[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for part, parameter in module._parameters.items():
            if parameter is not None and not part.startswith(PREFIX):
                name = clean_name(join(prefix, part))
                slots[name] = module, part
                names.setdefault((module, part), set()).add(name)
    return slots, names
