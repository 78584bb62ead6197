"""Pieces of sharded tensors. DTensors are told by what they can do, so that importing this costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.utils.torch_private import FSDP1_CHILD, dtensor_storage


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor (which may also be whole on every rank)."""
    return hasattr(tensor, "device_mesh")


def is_distributed() -> bool:
    """Whether a model can be sharded; what handles that imports most of torch.distributed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor (a collective: every rank has to ask); any other tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's piece of a DTensor, sharing its storage; any other tensor itself."""
    return dtensor_storage(tensor) if is_sharded(tensor) else tensor


def reshard(model: nn.Module) -> None:
    """Free the unsharded copies that FSDP2 keeps after a forward pass: what is written to them would be lost."""
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()  # type: ignore[operator]


def is_flattened(model: nn.Module) -> bool:
    """Whether FSDP1 has flattened parameters of it, which then are no longer what their names say."""
    return any(FSDP1_CHILD in module._modules for module in model.modules())


def is_first_rank() -> bool:
    """Whether this is the only process or the first of several."""
    return not is_distributed() or torch.distributed.get_rank() == 0


def on_first_rank(action: Callable[[], object]) -> None:
    """Do something on the first rank while the others wait; whatever it raises there is raised on all of them, so that none hangs.

    Others get a ValueError for a ValueError and an OSError for an OSError, with the same text. For anything else, an interrupt too,
    they get a RuntimeError that says its type and text: what does not pickle travels so as well.

    Raises:
        ValueError, OSError: the action's.
        RuntimeError: on the other ranks, for what else the action raised.
    """
    if not is_distributed():
        action()
        return
    if not is_first_rank():
        box: list[Any] = [None]
        torch.distributed.broadcast_object_list(box)
        if box[0] is not None:
            kind, text = box[0]
            error: Exception = kind(text)
            raise error
        return
    try:
        action()
    except BaseException as caught:
        known = next((kind for kind in (ValueError, OSError) if isinstance(caught, kind)), None)
        told = (known, str(caught)) if known else (RuntimeError, f"the first rank raised {type(caught).__qualname__}: {caught}")
        torch.distributed.broadcast_object_list([told])
        raise
    torch.distributed.broadcast_object_list([None])


def gathered_parameters(model: nn.Module, writeback: bool = False) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """``(module name, module, parameter name, parameter)`` of every parameter, at a moment when it can be read whole.

    FSDP1's are gathered a flat parameter at a time, so the order may differ from the model's. Others are as they are; a DTensor
    still wants :func:`full_tensor`. With ``writeback`` what is written to them stays.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    units = FullyShardedDataParallel.fsdp_modules(model)
    flat = {module for unit in units for module in _managed(unit)}
    for name, module in model.named_modules():
        if module not in flat:
            for parameter_name, parameter in module.named_parameters(recurse=False):
                yield name, module, parameter_name, parameter
    names = {module: name for name, module in model.named_modules()}
    for unit in units:
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=writeback):
            for module in _managed(unit):
                for parameter_name, parameter in module.named_parameters(recurse=False):
                    yield names[module], module, parameter_name, parameter


def _managed(unit: nn.Module) -> Iterator[nn.Module]:
    """The modules whose parameters an FSDP1 unit flattened: those in it but in no unit further in."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for child in unit.children():
        if not isinstance(child, FullyShardedDataParallel):
            yield child
            yield from _managed(child)


def local_shard(full: Tensor, like: Tensor) -> Tensor:
    """This rank's piece of a tensor that every rank has whole, cut as ``like`` is cut; no collective."""
    if not is_sharded(like):
        return full
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    placements: Any = like.placements  # type: ignore[attr-defined]
    dims = list(range(mesh.ndim))
    # FSDP on top of tensor parallelism cuts what that left: its mesh dimension stands first but cuts last.
    if any(hasattr(placement, "split_factor") for placement in placements):
        dims.reverse()
    for dim in dims:
        axis = getattr(placements[dim], "dim", None)
        if axis is not None:
            pieces = torch.chunk(full, mesh.size(dim), dim=axis)
            rank = mesh.get_coordinate()[dim]
            full = pieces[rank] if rank < len(pieces) else full.narrow(axis, 0, 0)
    return full


def distribute_like(full: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has whole as a DTensor that lies as ``like`` does; ``full`` itself if ``like`` is a plain tensor."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import DTensor

    piece = local_shard(full, like).to(local_tensor(like).device).contiguous()
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(piece, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


@torch.no_grad()
def broadcast(parameters: Iterable[Tensor], groups: Sequence[Any]) -> None:
    """Give every rank of the process groups the values of their first rank."""
    import torch.distributed as dist

    for parameter in parameters:
        mine = local_tensor(parameter)
        for group in groups:
            # NCCL takes what is on the GPU only, and Lightning moves modules there after they are adapted.
            moved = mine.to("cuda") if dist.get_backend(group) == "nccl" else mine
            dist.broadcast(moved, src=dist.get_global_rank(group, 0), group=group)
            if moved is not mine:
                mine.copy_(moved)
