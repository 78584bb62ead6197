"""A model's repeated blocks: what it consists of many times over, found without being told.

They are the units of work that pay: compiled once for all (:mod:`lightning_lora.model.compile`), sharded one by one (``lora_fsdp2``).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_lora.utils import transformers_conventions
from lightning_lora.utils.torch_private import WRAPPED_CHILDREN

BLOCKS = "an nn.ModuleList or nn.Sequential of at least two modules of one class that have modules and parameters inside"
_CONTAINERS = {nn.ModuleList, nn.ModuleDict}


def repeated_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """``(FQN, block)`` of every repeated block, in the model's order; never a block inside a block.

    They are the listed modules that the model itself names in ``_no_split_modules`` (Hugging Face), else the elements of every
    ``nn.ModuleList`` or ``nn.Sequential`` of at least two modules of one class that have modules and parameters inside.
    Every list counts, for an encoder's blocks are no reason to leave the decoder's out.

    Args:
        model: any module, wrapped or not; blocks come out of torch's wrappers.
    """
    named = {name for module in model.modules() for name in transformers_conventions.block_classes(module)}
    lists = [list(_elements(name, module)) for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    found = [(fqn, block) for blocks in lists for fqn, block in blocks if named & {cls.__name__ for cls in type(block).__mro__}]
    names: dict[nn.Module, str] = {}
    for fqn, block in found or [pair for blocks in lists if _alike(blocks) for pair in blocks]:
        names.setdefault(block, fqn)
    inside = {module for block in names for child in block.children() for module in child.modules()}
    return [(fqn, block) for block, fqn in names.items() if block not in inside]


def _elements(name: str, listed: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A list's elements, taken out of torch's wrappers."""
    for index, element in listed.named_children():
        yield _unwrapped(f"{name}.{index}" if name else index, element)


def _alike(blocks: list[tuple[str, nn.Module]]) -> bool:
    """Whether they are several of one class that can be called, with modules and parameters inside: metrics have none."""
    classes = {type(block) for _, block in blocks}
    if len(blocks) < 2 or len(classes) > 1 or classes & _CONTAINERS:
        return False
    return all(any(True for _ in inside) for inside in (blocks[0][1].children(), blocks[0][1].parameters()))


def _unwrapped(fqn: str, module: nn.Module) -> tuple[str, nn.Module]:
    for attribute in WRAPPED_CHILDREN:
        if attribute in module._modules:
            return _unwrapped(f"{fqn}.{attribute}", module._modules[attribute])  # type: ignore[arg-type]
    return fqn, module
