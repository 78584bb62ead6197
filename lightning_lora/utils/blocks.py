"""Find a model's repeated blocks, without being told which they are.

The blocks are compiled once for all of them (:mod:`lightning_lora.model.compile`) and sharded one by one (``lora_fsdp2``).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_lora.utils import transformers_conventions
from lightning_lora.utils.names import checked
from lightning_lora.utils.torch_private import WRAPPED_CHILDREN

BLOCKS = "an nn.ModuleList or nn.Sequential of at least two modules of one class that have modules and parameters inside"
_CONTAINERS = {nn.ModuleList, nn.ModuleDict}


def repeated_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return ``(FQN, block)`` for every repeated block, in the model's order. No block is inside another.

    The blocks are the listed modules whose class the model names in ``_no_split_modules`` (Hugging Face). For a model that names none,
    they are the elements of every ``nn.ModuleList`` or ``nn.Sequential`` of at least two modules of one class. Those modules must have
    modules and parameters inside. Every such list counts: a model may have an encoder's blocks and a decoder's blocks.

    Args:
        model: any module, wrapped or not. Blocks are returned without torch's wrappers.
    """
    named = {name for module in checked(model).modules() for name in transformers_conventions.block_classes(module)}
    lists = [list(_elements(name, module)) for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    found = [(fqn, block) for blocks in lists for fqn, block in blocks if named & {cls.__name__ for cls in type(block).__mro__}]
    names: dict[nn.Module, str] = {}
    for fqn, block in found or [pair for blocks in lists if _alike(blocks) for pair in blocks]:
        names.setdefault(block, fqn)
    inside = {module for block in names for child in block.children() for module in child.modules()}
    return [(fqn, block) for block, fqn in names.items() if block not in inside]


def _elements(name: str, listed: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a list's elements without torch's wrappers."""
    for index, element in listed.named_children():
        yield _unwrapped(f"{name}.{index}" if name else index, element)


def _alike(blocks: list[tuple[str, nn.Module]]) -> bool:
    """True for at least two modules of one class that can be called and that have modules and parameters inside.

    Lists of metrics have no parameters, so they do not count.
    """
    classes = {type(block) for _, block in blocks}
    if len(blocks) < 2 or len(classes) > 1 or classes & _CONTAINERS:
        return False
    return all(any(True for _ in inside) for inside in (blocks[0][1].children(), blocks[0][1].parameters()))


def _unwrapped(fqn: str, module: nn.Module) -> tuple[str, nn.Module]:
    for attribute in WRAPPED_CHILDREN:
        if attribute in module._modules:
            return _unwrapped(f"{fqn}.{attribute}", module._modules[attribute])  # type: ignore[arg-type]
    return fqn, module
