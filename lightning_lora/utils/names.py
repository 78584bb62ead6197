"""Names of modules and parameters without the parts that wrappers add.

Compilers, FSDP and activation checkpointing add parts to names. Patterns, adapter files and checkpoints use the names without those
parts. So a run with ``torch.compile`` and a run without it can read each other's files.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_lora.utils.torch_private import COMPILED_CHILD, FABRIC_CHILDREN, WRAPPED_CHILDREN, uncompiled

_WRAPPERS = (COMPILED_CHILD, *WRAPPED_CHILDREN, *FABRIC_CHILDREN)


def checked(model: nn.Module) -> nn.Module:
    """Return a model. Raise ValueError if it is something else: its name, a Fabric, a list of parts."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"{model!r:.60}"
        raise ValueError(f"model={what}: give a torch.nn.Module, such as AutoModelForCausalLM.from_pretrained(...) returns.")
    return model


def clean_name(name: str) -> str:
    """Return a fully qualified name without the wrappers' parts."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def join(*names: str) -> str:
    """Return a fully qualified name of its parts. That of the root is empty, and left out."""
    return ".".join(filter(None, names))


def bare(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers whose parts :func:`clean_name` removes."""
    while (child := next((name for name in _WRAPPERS if name in model._modules), None)) is not None:
        model = model.get_submodule(child)
    return model


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return clean name → module, without the root. A module that two parents share appears under both names."""
    found: dict[str, nn.Module] = {}
    for name, module in checked(model).named_modules(remove_duplicate=False):
        found[clean_name(name)] = module  # a wrapped module comes after its wrapper and replaces it
    found.pop("", None)
    return found


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return clean name → parameter. A parameter that two modules share appears under both names."""
    return {clean_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return name → buffer for the buffers that a state dict contains."""
    found = {}
    for prefix, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                found[clean_name(join(prefix, name))] = buffer
    return found


def second_names(model: nn.Module) -> dict[str, str]:
    """Return first name → another name of the same module, for modules that two parents share."""
    first: dict[nn.Module, str] = {}
    found: dict[str, str] = {}
    for name, module in modules_by_name(model).items():
        if first.setdefault(module, name) != name:
            found.setdefault(first[module], name)
    return found


def adapter_root(model: nn.Module) -> tuple[str, nn.Module]:
    """Return ``(name, module)`` of the module that names in adapter files are relative to.

    For a LightningModule with exactly one child that has parameters, that is the child, unless the child is a single layer: then no name
    would be left for it. For the wrappers of DDP, DataParallel, averaged weights and Fabric it is what they wrap. For anything else it is
    the model itself. So an adapter of ``MyTask(model=llama)`` fits ``llama`` alone, and the reverse.
    """
    names: list[str] = []
    while (inside := _wrapped(uncompiled(checked(model)))) is not None:
        names, model = [*names, inside[0]], inside[1]
    if hasattr(task := uncompiled(model), "configure_optimizers"):
        children = [(name, child) for name, child in task.named_children() if next(child.parameters(), None) is not None]
        own = any(True for _ in task.parameters(recurse=False))
        if len(children) == 1 and not own and _has_layers(children[0][1]):
            names, model = [*names, children[0][0]], children[0][1]
    return join(*names), model


def _has_layers(module: nn.Module) -> bool:
    return any(next(part.parameters(), None) is not None for part in bare(module).children())


def _wrapped(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return what a wrapper wraps, with its name in the wrapper's state dict (Fabric's has none); None for other modules."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)):
        return "module", model.module
    runs, _ = FABRIC_CHILDREN
    return ("", model.get_submodule(runs)) if all(name in model._modules for name in FABRIC_CHILDREN) else None
