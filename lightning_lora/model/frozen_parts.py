"""Refuse adapters in parts that the user froze as a whole, such as a teacher. These must not train.

Three cases are allowed: a model that is frozen altogether; frozen blocks of a list, such as the first half; and a copy of a part that
trains, with the same targets. User code moves such a copy after its original, by pairs of parameters, by names or by ``load_state_dict``: a
momentum encoder (MoCo, BYOL, DINO), a target network (DQN, DDPG), an average. Its adapters begin as the original's and do not train.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import PREFIX, LoRALayer, lora_layers
from lightning_lora.quantization.formats import format_of
from lightning_lora.registry import VARIANTS, data_of, has_start, kind_of
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.patterns import layer_index
from lightning_lora.utils.sharding import is_sharded


def frozen_copies(model: nn.Module, targets: Mapping[str, nn.Module], saved: Sequence[str], config: LoRAConfig) -> dict[str, str]:
    """Return FQN of a part that is frozen as a whole → FQN of the part that trains and whose copy it is.

    A copy has the class, the parameters and the targets of its original. There is none if the two would not stay alike: with an init that
    keeps a start or reads data, and with a variant that changes ranks.

    Args:
        model: the whole module, without adapters.
        targets: FQN → module to adapt, or with rows that train.
        saved: FQNs of what trains in full.
        config: its init and variant.
    """
    apart = has_start(config.init) or data_of(config.init) is not None or getattr(VARIANTS[config.variant], "prunes", False)
    if apart or any(isinstance(module, LoRALayer) for module in model.modules()):
        return {}
    wanted = set(targets.values())
    trains = [part for part in model.named_modules() if any(p.requires_grad for p in part[1].parameters())]
    found: dict[str, str] = {}
    for name, frozen in _frozen_parts(model):
        hits = wanted & {*frozen.modules()}
        inside = [(fqn, part) for fqn, part in frozen.named_modules(prefix=name) if hits and hits <= {*part.modules()}]
        for fqn, part in inside:
            if originals := [other for other, original in trains if is_copy(part, original)]:
                alike = (other for other in originals if _below(fqn, targets, saved) == _below(other, targets, saved))
                found.update({clean_name(fqn): clean_name(other) for other in islice(alike, 1)})
                break  # a layer in a copy whose other targets differ is none: pairs of the two would not match
    return found


def begin_as_originals(model: nn.Module, copies: Mapping[str, str]) -> None:
    """Give the adapters of copies the values of their originals', and freeze the copies."""
    for name, of in copies.items():
        copy = model.get_submodule(name)
        theirs = dict(model.get_submodule(of).named_parameters())
        with torch.no_grad():
            for own, parameter in copy.named_parameters():
                if own.rpartition(".")[2].startswith(PREFIX):
                    parameter.copy_(theirs[own])
        copy.requires_grad_(False)


def plain_copies(model: nn.Module) -> dict[str, str]:
    """Return FQN of a frozen part without adapters → FQN of the adapted part whose base it is a copy of."""
    adapted = [part for part in model.named_modules() if any(isinstance(module, LoRALayer) for module in part[1].modules())]
    found: dict[str, str] = {}
    for name, frozen in _frozen_parts(model):
        if not any(isinstance(module, LoRALayer) for module in frozen.modules()):
            inside = [(name, frozen), *((f"{name}.{child}", part) for child, part in frozen.named_children())]
            pairs = ((clean_name(fqn), clean_name(of)) for fqn, part in inside for of, original in adapted if is_copy(part, original))
            found.update([pair] if (pair := next(pairs, None)) else [])
    return found


def asleep(model: nn.Module) -> list[str]:
    """Return the names of adapted layers none of whose adapter trains. Those of a copy of a part that trains are left out."""
    adapters = ((name, layer, layer.lora_parameters().values()) for name, layer in lora_layers(model))
    layers = [(name, layer) for name, layer, own in adapters if own and not any(p.requires_grad for p in own)]  # tied rows own nothing
    trains = [part for part in model.modules() if any(p.requires_grad for p in part.parameters())] if layers else []
    copies = [part for _, part in _frozen_parts(model) if any(_alike(each, other) for each in (part, *part.children()) for other in trains)]
    following = {module for part in copies for module in part.modules()}
    return [clean_name(name) for name, layer in layers if layer not in following]


def _alike(part: nn.Module, original: nn.Module) -> bool:
    """Return whether a part has the class and the parameters' names of another, adapters included."""
    if isinstance(part, LoRALayer) or type(part) is not type(original):
        return False
    return [name for name, _ in part.named_parameters()] == [name for name, _ in original.named_parameters()]


def is_copy(part: nn.Module, original: nn.Module) -> bool:
    """Return whether a part has the class of another, and parameters of its own that are equal to the other's base."""
    if part is original or type(part) is not getattr(type(original), "lora_base", type(original)):
        return False
    mine, theirs = (
        {name: p for name, p in each.named_parameters() if not name.rpartition(".")[2].startswith(PREFIX)} for each in (part, original)
    )
    return mine.keys() == theirs.keys() and all(_equal(mine[name], theirs[name]) for name in mine)


def _equal(mine: Tensor, theirs: Tensor) -> bool:
    same = (mine.shape, mine.dtype, mine.device) == (theirs.shape, theirs.dtype, theirs.device) and mine is not theirs
    if not same or mine.is_meta or is_sharded(mine) or is_sharded(theirs):
        return False
    mine, theirs = mine.detach(), theirs.detach()
    if not hasattr(mine, "__tensor_flatten__"):
        return torch.equal(mine, theirs)
    parts = mine.__tensor_flatten__()[0]  # torchao's quantized weights cannot be compared as a whole
    return type(mine) is type(theirs) and all(_equal(getattr(mine, part), getattr(theirs, part)) for part in parts)


def _below(fqn: str, *names: Iterable[str]) -> list[set[str]]:
    """Return the names in a part, from there on."""
    start = f"{clean_name(fqn)}."
    return [{name.removeprefix(start) for name in each if name.startswith(start)} for each in names]


def mixed_with_frozen(model: nn.Module, targets: dict[str, nn.Module], copies: Collection[str] = ()) -> list[str]:
    """Return a refusal if some targets are in parts frozen as a whole and others are not. Else return an empty list.

    Args:
        model: the whole module, without adapters.
        targets: FQN → module to adapt.
        copies: names of frozen parts that may be adapted.
    """
    if any(isinstance(module, LoRALayer) for module in model.modules()):  # the base is frozen then, and was checked before that
        return []
    parts = {clean_name(name): set(part.modules()) for name, part in _frozen_parts(model)}
    frozen = {name: [fqn for fqn, module in targets.items() if module in inside] for name, inside in parts.items()}
    frozen = {name: hits for name, hits in frozen.items() if hits}
    inside = {fqn for hits in frozen.values() for fqn in hits}
    frozen = {name: hits for name, hits in frozen.items() if not any(f"{each}.".startswith(f"{name}.") for each in copies)}
    others = [fqn for fqn, module in targets.items() if fqn not in inside and _trains(module)]
    if not frozen or not others:
        return []
    name, hits = next(iter(frozen.items()))
    other = _part(others[0], list(frozen))
    return [
        f"target_modules hits {hits[0]!r} in {name!r}, which is frozen as a whole, and {others[0]!r}, which trains: adapters would train"
        f" the frozen part too. Choose one with LoRACallback(module={other!r}) or module={name!r}, or exclude the frozen one:"
        f" exclude_modules=[r'{name}\\..*']. To adapt both, call requires_grad_() with the same value on both before. A part that your code"
        " moves after the other (an average, a target network) has to be a copy with equal weights by then."
    ]


def _frozen_parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the largest children that are frozen as a whole. Skip layers, and blocks of a list or a sequence."""
    for name, child in module.named_children():
        fqn = f"{prefix}{name}"
        flags = [parameter.requires_grad for parameter in _plain_parameters(child)]
        if not flags or name.isdigit() or layer_index(fqn) is not None or kind_of(type(child)) is not None:
            continue
        if not any(flags):
            yield fqn, child
        elif not all(flags):
            yield from _frozen_parts(child, f"{fqn}.")


def _plain_parameters(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters that can train. Packed and integer ones cannot."""
    for part in module.modules():
        packed = format_of(part) is not None
        yield from (p for p in part._parameters.values() if p is not None and p.is_floating_point() and not packed)


def _trains(module: nn.Module) -> bool:
    return format_of(module) is not None or any(p.requires_grad for p in module.parameters())


def _part(fqn: str, frozen: list[str]) -> str:
    """Return the outermost module around a target that contains no frozen part."""
    names = fqn.split(".")
    outer = (".".join(names[:length]) for length in range(1, len(names) + 1))
    return next(name for name in outer if not any(part == name or part.startswith(name + ".") for part in frozen))
