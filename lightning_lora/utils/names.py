"""What modules and parameters are called, whatever wraps them.

Compilers, FSDP and activation checkpointing put parts of their own into names. Patterns, adapter files and checkpoints
use names without them, so that a run with and one without ``torch.compile`` read each other's files.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_lora.utils.torch_private import COMPILED_CHILD, WRAPPED_CHILDREN

_WRAPPERS = (COMPILED_CHILD, *WRAPPED_CHILDREN)


def clean_name(name: str) -> str:
    """A fully qualified name without the wrappers' parts."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Clean name → module, the root left out; a module that two parents share comes under both names."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[clean_name(name)] = module  # of a wrapper and what it wraps, the inner one comes later and stays
    found.pop("", None)
    return found


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Name → buffer, of the buffers that a state dict has."""
    found = {}
    for prefix, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                found[clean_name(f"{prefix}.{name}" if prefix else name)] = buffer
    return found


def second_names(model: nn.Module) -> dict[str, str]:
    """First name → another name of the same module, for modules that two parents share."""
    first: dict[nn.Module, str] = {}
    found: dict[str, str] = {}
    for name, module in modules_by_name(model).items():
        if first.setdefault(module, name) != name:
            found.setdefault(first[module], name)
    return found


def adapter_root(model: nn.Module) -> tuple[str, nn.Module]:
    """``(name, module)`` that adapter files are relative to: the model itself, or for a LightningModule with one child
    that has parameters, that child, and for DDP's wrapper what it wraps. So an adapter of ``MyTask(model=llama)`` fits ``llama``
    alone, and the other way round.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return "module", model.module
    if hasattr(model, "configure_optimizers"):
        children = [(name, child) for name, child in model.named_children() if next(child.parameters(), None) is not None]
        own = any(True for _ in model.parameters(recurse=False))
        if len(children) == 1 and not own:
            return children[0]
    return "", model
