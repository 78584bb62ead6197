"""Collect what an adapter file holds beside A and B: modules trained in full, trained biases, running statistics, new base weights.

PEFT writes the embeddings of a model whose vocabulary was resized, because no checkpoint has the new rows. Such a weight is loaded into
the base and noted on its module. So the next file of that adapter has it too.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import PREFIX, LoRALayer
from lightning_lora.model.heads import saved_modules, within
from lightning_lora.model.merge import unmerged
from lightning_lora.model.noted_state import EXTRA, base_buffers, moved_extra_state
from lightning_lora.quantization.formats import format_of
from lightning_lora.utils.names import clean_name, join
from lightning_lora.utils.torch_private import NormWithStatistics

_BROUGHT = "_lora_brought"  # names of a module's own base weights that were loaded from an adapter file


def is_adapter(name: str) -> bool:
    """Return whether a name in a state dict is an adapter's."""
    return name.rpartition(".")[2].startswith(PREFIX)


def extra_tensors(root: nn.Module, config: LoRAConfig, adapted: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors that an adapter with this config has beside A and B.

    Args:
        root: the model, adapted already or not.
        config: the adapter's config.
        adapted: FQNs of the layers that are or will be adapted.

    Returns:
        FQN, without the names of wrappers, → tensor of the model's state dict.
    """
    saved = saved_modules(root, config)
    statistics = {clean_name(name) for name, module in root.named_modules() if isinstance(module, NormWithStatistics)}
    extras: dict[str, Tensor] = {}
    for name, tensor in root.state_dict(keep_vars=True).items():
        name = clean_name(name)
        owner, _, last = name.rpartition(".")
        trained_bias = last.endswith("bias") and (config.bias == "all" or (config.bias == "lora_only" and owner in adapted))
        # Training changes running statistics, unlike the rest of the base: without them a loaded model computes something else.
        statistic = owner in statistics and not isinstance(tensor, nn.Parameter)
        if not is_adapter(name) and (within(name, saved) or trained_bias or statistic):
            extras[name] = tensor
    return extras


def brought_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Return FQN → base weight that was loaded from an adapter file, or that training moved."""
    return {fqn: base_value(module, part) for fqn, module, part in _brought(root)}


def brought_names(root: nn.Module) -> set[str]:
    """Return the names of :func:`brought_tensors`."""
    return {fqn for fqn, _, _ in _brought(root)}


def _brought(root: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for name, module in root.named_modules():
        for part in module.__dict__.get(_BROUGHT, ()):
            yield clean_name(join(name, part)), module, part


def base_value(module: nn.Module, name: str) -> Tensor:
    """Return a parameter; of a merged layer, the base's value of it."""
    value: Tensor = module._parameters[name]  # type: ignore[assignment]
    if not isinstance(module, LoRALayer) or not module.merged or name not in module.adapted:
        return value
    with unmerged(module):
        return module._parameters[name].detach().clone()  # type: ignore[union-attr]


def warn_of_state(model: nn.Module, root: nn.Module, where: str) -> None:
    """Warn of state that moved since the model was adapted, and that an adapter folder cannot hold. A checkpoint holds it.

    Args:
        model: what the user saves.
        root: the module in it that the folder is for.
        where: the folder.
    """
    extra = [f"the extra state of {name!r}" for name in moved_extra_state(model)]
    inside = {id(buffer) for buffer in root.buffers()}
    around = [f"the buffer {name!r}" for name, buffer in base_buffers(model, moved=True).items() if id(buffer) not in inside]
    made = [f"{name!r}, which the module's own state_dict() makes" for name in made_by_user(root)]
    if lost := [*extra, *around, *made]:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        warnings.warn(
            f"{where} cannot hold {lost[0]}{more}: a model that loads this folder computes without what moved there. Load it from a"
            " checkpoint of LoRACallback, by load_adapter(model, 'last.ckpt') or fit(ckpt_path=...).",
            stacklevel=3,
        )


def made_by_user(root: nn.Module) -> list[str]:
    """Return the names in a state dict that are no parameter's, no buffer's and no extra state: user code adds them."""
    packed = tuple(clean_name(f"{name}.") for name, module in root.named_modules() if format_of(module) is not None)
    known = {clean_name(name) for name, _ in (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))}
    names = [name for name in map(clean_name, root.state_dict(keep_vars=True)) if name.rpartition(".")[2] != EXTRA]
    return [name for name in names if name not in known and not name.startswith(packed)]


def note_brought(root: nn.Module, names: Iterable[str]) -> None:
    """Record on the modules which of their base weights came from an adapter file. Earlier records are replaced."""
    wanted = set(names)
    for name, module in root.named_modules():
        parts = {part for part, _ in module._parameters.items() if clean_name(join(name, part)) in wanted}
        module.__dict__.pop(_BROUGHT, None)
        if parts:
            module.__dict__[_BROUGHT] = frozenset(parts)


def why_not_brought(model: nn.Module, mine: Tensor, theirs: Tensor, *, check: bool) -> str | None:
    """Return why a file's base weight cannot replace this model's; None if it can.

    Args:
        model: the adapter's root.
        mine: this model's weight.
        theirs: the file's weight.
        check: require half of the rows to be equal. This distinguishes a resized vocabulary from another base.
    """
    if mine.shape == theirs.shape:
        if mine.is_meta:  # without values there is nothing to compare; the caller refuses such a model
            return None
        rows = _same_values(mine.detach().cpu(), theirs.detach().cpu()).reshape(len(mine) if mine.ndim else 1, -1).all(1)
        other = 1 - rows.float().mean().item()
        if not check or other <= 0.5:
            return None
        return f"differs from this model's in {other:.0%} of its rows, so the base is another; check_base=False replaces this model's"
    resized = mine.ndim == theirs.ndim and mine.shape[1:] == theirs.shape[1:] and hasattr(model, "resize_token_embeddings")
    how = f": call resize_token_embeddings({len(theirs)}) first" if resized else ""
    return f"has shape {tuple(theirs.shape)}, this model's has {tuple(mine.shape)}{how}"


def equal_values(mine: Tensor, theirs: Tensor) -> bool:
    """Return whether two tensors are the same up to the rounding of the narrower dtype."""
    return mine.shape == theirs.shape and not mine.is_meta and bool(_same_values(mine.detach().cpu(), theirs.detach().cpu()).all())


def _same_values(mine: Tensor, theirs: Tensor) -> Tensor:
    if mine.is_floating_point() and theirs.is_floating_point():
        narrow = min(mine.dtype, theirs.dtype, key=lambda dtype: -torch.finfo(dtype).eps)
        mine, theirs = mine.to(narrow), theirs.to(narrow)
    return mine == theirs


def takes_extra_state(module: nn.Module | None) -> bool:
    """Return whether a module is there and has state of its own kind in its state dict (torch's ``set_extra_state``)."""
    return module is not None and type(module).set_extra_state is not nn.Module.set_extra_state


def check_values_kept(tensors: Mapping[str, Tensor], where: str, loss: str) -> None:
    """Raise ValueError if a tensor is on the meta device, where a copy does nothing."""
    meta = [clean_name(name) for name, tensor in tensors.items() if tensor.is_meta]
    if meta:
        raise ValueError(
            f"{where}: {meta[0]!r} ({len(meta)} of {len(tensors)} tensors) is on the meta device, and {loss}: give the model its weights"
            " first (from_pretrained, or to_empty and load_state_dict)."
        )
