"""Refuse adapters in parts that the user froze as a whole, such as a teacher or an EMA copy. These must not train.

Two cases are allowed: a model that is frozen altogether, and frozen blocks of a list, such as the first half.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.quantization.formats import format_of
from lightning_lora.registry import kind_of
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.patterns import layer_index


def mixed_with_frozen(model: nn.Module, targets: dict[str, nn.Module]) -> list[str]:
    """Return a refusal if some targets are in parts frozen as a whole and others are not. Else return an empty list.

    Args:
        model: the whole module, without adapters.
        targets: FQN → module to adapt.
    """
    if any(isinstance(module, LoRALayer) for module in model.modules()):  # the base is frozen then, and was checked before that
        return []
    parts = {clean_name(name): set(part.modules()) for name, part in _frozen_parts(model)}
    frozen = {name: [fqn for fqn, module in targets.items() if module in inside] for name, inside in parts.items()}
    frozen = {name: hits for name, hits in frozen.items() if hits}
    inside = {fqn for hits in frozen.values() for fqn in hits}
    others = [fqn for fqn, module in targets.items() if fqn not in inside and _trains(module)]
    if not frozen or not others:
        return []
    name, hits = next(iter(frozen.items()))
    other = _part(others[0], list(frozen))
    return [
        f"target_modules hits {hits[0]!r} in {name!r}, which is frozen as a whole, and {others[0]!r}, which trains: adapters would train"
        f" the frozen part too. Choose one with LoRACallback(module={other!r}) or module={name!r}, or exclude the frozen one:"
        f" exclude_modules=[r'{name}\\..*']. To adapt both, call requires_grad_() with the same value on both before."
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
