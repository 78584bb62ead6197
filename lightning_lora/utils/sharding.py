"""Sharded tensors, work of the first rank only, and parameters that FSDP1 flattened.

A DTensor is recognized by its attributes, so importing this file does not import ``torch.distributed.tensor``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_lora.utils.torch_private import FSDP1_CHILD, dtensor_storage

T = TypeVar("T")


def is_sharded(tensor: Tensor) -> bool:
    """True if the tensor is a DTensor. A DTensor may also be replicated: full on every rank."""
    return hasattr(tensor, "device_mesh")


def is_distributed() -> bool:
    """True if a process group exists, so that a model can be sharded. Code for that case imports most of torch.distributed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor (a collective: every rank must call it). Return any other tensor unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def full_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """Return the full tensors of n DTensors of one shape and one placement as one plain tensor (n, ...), gathered by one collective."""
    from torch.distributed.tensor import DTensor

    like: Any = tensors[0]
    local = torch.stack([local_tensor(tensor) for tensor in tensors], -1)  # as the last dimension: the others keep their placements
    shape = torch.Size((*like.shape, len(tensors)))
    strides = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=strides)
    return whole.full_tensor().movedim(-1, 0)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's local shard of a DTensor, sharing its storage. Return any other tensor unchanged."""
    return dtensor_storage(tensor) if is_sharded(tensor) else tensor


def shard_groups(tensor: Tensor) -> tuple[Any, ...]:
    """Return the process groups over which a DTensor is cut, not those where it is replicated. Return none for any other tensor."""
    if not is_sharded(tensor):
        return ()
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate())


@torch.no_grad()
def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of each tensor, (n,), float64 on the CPU. Read in pieces, so that no wide copy of a tensor exists.

    Of sharded tensors only the sums travel: one collective for all that are cut over the same groups.
    """
    together: dict[tuple[Any, ...], list[int]] = {}
    parts: list[Tensor] = []
    for number, tensor in enumerate(tensors):
        if any(placement.is_partial() for placement in getattr(tensor, "placements", ())):
            tensor = full_tensor(tensor)  # each rank has a summand of each entry
        together.setdefault((local_tensor(tensor).device, shard_groups(tensor)), []).append(number)
        parts.append(_square(local_tensor(tensor.detach())))
    found = torch.empty(len(tensors), dtype=torch.float64)
    for (_, groups), numbers in together.items():
        sums = torch.stack([parts[number] for number in numbers])
        for group in groups:
            torch.distributed.all_reduce(sums, group=group)
        found[numbers] = sums.cpu().double()
    return found


def _square(tensor: Tensor) -> Tensor:
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64  # MPS has no float64
    pieces = tensor.reshape(-1).split(1 << 22)
    return torch.stack([torch.linalg.vector_norm(piece, dtype=wide).square() for piece in pieces]).sum()


def summed(tensor: Tensor) -> Tensor:
    """Return a DTensor whose shards are parts of a sum as the sum, on every rank; any other tensor as it is."""
    if not is_sharded(tensor) or not any(placement.is_partial() for placement in tensor.placements):  # type: ignore[attr-defined]
        return tensor
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)  # type: ignore[attr-defined]


def cut_dimensions(tensor: Tensor) -> set[int]:
    """Return the dimensions along which a DTensor is cut; none for any other tensor."""
    placements: Any = tensor.placements if is_sharded(tensor) else ()  # type: ignore[attr-defined]
    return {placement.dim for placement in placements if not placement.is_replicate()}


def reshard(model: nn.Module) -> None:
    """Free the unsharded copies that FSDP2 keeps after a forward pass. Values written to those copies would be lost."""
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()  # type: ignore[operator]


def is_flattened(model: nn.Module) -> bool:
    """True if FSDP1 has flattened parameters of the model. Their names then no longer describe them."""
    return any(FSDP1_CHILD in module._modules for module in model.modules())


def is_first_rank() -> bool:
    """True for the only process, or for the first of several."""
    return not is_distributed() or torch.distributed.get_rank() == 0


def on_first_rank(action: Callable[[], object]) -> None:
    """Run an action on the first rank while the other ranks wait. If it raises, all ranks raise, so that none hangs.

    For a ValueError or an OSError, the other ranks raise the same type with the same text. For anything else, an interrupt included,
    they raise a RuntimeError that states its type and text. So an exception that cannot be pickled reaches them too.

    Raises:
        ValueError, OSError: raised by the action.
        RuntimeError: on the other ranks, for anything else that the action raised.
    """
    on_first_rank_with_help(lambda _: action(), lambda _: None)


def on_first_rank_with_help(action: Callable[[Callable[[int], T]], object], answer: Callable[[int], T]) -> None:
    """Run an action on the first rank. It needs collectives, at times that only this rank knows. Otherwise as :func:`on_first_rank`.

    Args:
        action: gets a function that calls ``answer`` on every rank, and returns the first rank's result.
        answer: number of a question → its answer; it may use collectives.
    """
    if not is_distributed():
        action(answer)
        return
    if not is_first_rank():
        _help(answer)
        return

    def ask(question: int) -> T:
        torch.distributed.broadcast_object_list([question])
        return answer(question)

    try:
        action(ask)
    except BaseException as caught:
        known = next((kind for kind in (ValueError, OSError) if isinstance(caught, kind)), None)
        told = (known, str(caught)) if known else (RuntimeError, f"the first rank raised {type(caught).__qualname__}: {caught}")
        torch.distributed.broadcast_object_list([told])
        raise
    torch.distributed.broadcast_object_list([None])


def _help(answer: Callable[[int], object]) -> None:
    """Answer the first rank's questions until it is done."""
    box: list[Any] = [None]
    torch.distributed.broadcast_object_list(box)
    while isinstance(box[0], int):
        try:
            answer(box[0])
            torch.distributed.broadcast_object_list(box)
        except BaseException:
            while isinstance(box[0], int):  # at the end the first rank sends the outcome, and waits until all have it
                torch.distributed.broadcast_object_list(box)
            raise
    if box[0] is not None:
        kind, text = box[0]
        error: Exception = kind(text)
        raise error


def gathered_parameters(model: nn.Module, writeback: bool = False) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield ``(module name, module, parameter name, parameter)`` for every parameter, while it can be read in full.

    FSDP1's flat parameters are gathered one at a time, so the order may differ from the model's. Other parameters are yielded
    unchanged; a DTensor still needs :func:`full_tensor`. With ``writeback``, what is written to a parameter stays.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    units = FullyShardedDataParallel.fsdp_modules(model)
    flat = flattened(model)
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


def flattened(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return module → the FSDP1 unit that flattened its parameters, for the modules that one did."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return {module: unit for unit in FullyShardedDataParallel.fsdp_modules(model) for module in _managed(unit)}


@contextmanager
def gathered(unit: nn.Module | None) -> Iterator[None]:
    """Gather the parameters of an FSDP1 unit inside the ``with`` block (a collective). Do nothing without a unit."""
    if unit is None:
        yield
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
        yield


def _managed(unit: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose parameters an FSDP1 unit flattened: those in it, but not in a nested unit."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for child in unit.children():
        if not isinstance(child, FullyShardedDataParallel):
            yield child
            yield from _managed(child)


def local_shard(full: Tensor, like: Tensor) -> Tensor:
    """Return this rank's local shard of a tensor that every rank has in full, sharded as ``like`` is. No collective."""
    if not is_sharded(like):
        return full
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    placements: Any = like.placements  # type: ignore[attr-defined]
    dims = list(range(mesh.ndim))
    # FSDP on top of tensor parallelism splits the tensor-parallel shard: its mesh dimension is first but splits last.
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
    """Return a tensor that every rank has in full as a DTensor with the mesh and placements of ``like``.

    If ``like`` is a plain tensor, return ``full`` itself.
    """
    if not is_sharded(like):
        return full
    return with_local(local_shard(full, like).to(local_tensor(like).device).contiguous(), like)


def with_local(local: Tensor, like: Tensor) -> Tensor:
    """Return this rank's local shard as a DTensor with the mesh, placements and shape of ``like``. No collective.

    If ``like`` is a plain tensor, return ``local`` itself.
    """
    if not is_sharded(like):
        return local
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


@torch.no_grad()
def broadcast(parameters: Iterable[Tensor], groups: Sequence[Any]) -> None:
    """Copy the values of the first rank of each process group to all its ranks."""
    import torch.distributed as dist

    for parameter in parameters:
        mine = local_tensor(parameter)
        for group in groups:
            # NCCL needs tensors on the GPU, and Lightning moves modules there only after they are adapted.
            moved = mine.to("cuda") if dist.get_backend(group) == "nccl" else mine
            dist.broadcast(moved, src=dist.get_global_rank(group, 0), group=group)
            if moved is not mine:
                mine.copy_(moved)
