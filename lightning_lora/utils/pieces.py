"""Read single entries of a tensor of which each rank holds a piece. Nothing is gathered but these entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.utils.sharding import is_sharded, local_shard, local_tensor, shard_groups
from lightning_lora.utils.torch_private_parallel import fsdp1_runs

_ABSENT = -(2**63)  # below every code


@dataclass(frozen=True)
class Piece:
    """The part of a tensor that this rank holds: a box, or a run of the full tensor's memory.

    Attributes:
        local: its values; one dimension for a run.
        shape: of the full tensor.
        starts: index in the full tensor of the first local entry, along each dimension of ``local``.
        groups: process groups over which the pieces are spread; none for a full tensor.
        strides: for a run, the full tensor's strides; None for a box.
        without: rows of the full tensor whose entries are not read: they count as zero.
    """

    local: Tensor
    shape: tuple[int, ...]
    starts: tuple[int, ...]
    groups: tuple[Any, ...] = ()
    strides: tuple[int, ...] | None = None
    without: tuple[int, ...] = ()

    def codes(self, index: Tensor) -> Tensor:
        """Return the entries at flat positions of the full tensor, each as an integer; for those elsewhere, a number below all of these.

        Args:
            index: positions (n,) in row-major order, on the CPU.

        Returns:
            int64 (n,), on the CPU. A number in floating point is rounded to bf16, and its bits are returned.
        """
        if not index.numel():
            return index
        if self.local.shape == self.shape and self.local.is_contiguous() and not self.without and self.strides is None:  # as it lies
            return _codes(self.local.view(-1)[index.to(self.local.device)]).cpu()
        places = torch.unravel_index(index, self.shape or (1,))
        unread = torch.isin(places[0], torch.tensor(self.without, dtype=places[0].dtype))
        if self.strides is not None:
            places = (torch.stack([place * stride for place, stride in zip(places, self.strides, strict=True)]).sum(0),)
        local = self.local if self.local.ndim else self.local[None]
        here = [place - start for place, start in zip(places, self.starts or (0,), strict=True)]
        inside = torch.stack([(place >= 0) & (place < size) for place, size in zip(here, local.shape, strict=True)]).all(0)
        codes = torch.full_like(index, _ABSENT)
        codes[inside] = _codes(local[tuple(place[inside].to(local.device) for place in here)]).cpu()
        return codes.masked_fill(unread, 0)


def piece_of(tensor: Tensor, without: tuple[int, ...] = ()) -> Piece:
    """Return this rank's piece of a parameter: a shard of a DTensor, or a plain tensor in full. The rows ``without`` are not read."""
    tensor, shape = tensor.detach(), tuple(tensor.shape)
    if not is_sharded(tensor):
        return Piece(tensor, shape, (0,) * len(shape), without=without)
    return Piece(local_tensor(tensor), shape, _starts(tensor), shard_groups(tensor), without=without)


def flattened_pieces(model: nn.Module) -> dict[tuple[nn.Module, str], Piece]:
    """Return module and name → this rank's piece, for every parameter that FSDP1 flattened."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return {
        place: Piece(local, shape, (start,), (unit.process_group,), strides)
        for unit in FullyShardedDataParallel.fsdp_modules(model)
        for place, local, shape, start, strides in fsdp1_runs(unit)
    }


def _starts(tensor: Tensor) -> tuple[int, ...]:
    """Return the index of the first local entry, along each dimension."""
    starts = []
    for dim, size in enumerate(tensor.shape):
        index = torch.arange(size).view(-1, *[1] * (tensor.ndim - dim - 1)).expand(tensor.shape)  # no memory: all strides but one are 0
        mine = local_shard(index, tensor)
        starts.append(int(mine[(0,) * mine.ndim]) if mine.numel() else 0)
    return tuple(starts)


def _codes(values: Tensor) -> Tensor:
    if values.is_complex():
        values = torch.view_as_real(values).sum(-1)
    return (values.to(torch.bfloat16).view(torch.int16) if values.is_floating_point() else values).long()


def whole_codes(pieces: Sequence[Piece], indices: Sequence[Tensor]) -> list[Tensor]:
    """Return :meth:`Piece.codes` of the full tensors. A collective for those that are sharded: one for all over the same groups.

    Args:
        pieces: of one tensor each.
        indices: the positions to read in each.
    """
    codes = [piece.codes(index) for piece, index in zip(pieces, indices, strict=True)]
    together: dict[tuple[Any, ...], list[int]] = {}
    for number, piece in enumerate(pieces):
        together.setdefault(piece.groups, []).append(number)
    for groups, numbers in together.items():
        joined = torch.cat([codes[number] for number in numbers])
        for group in groups:
            joined = _largest(joined, group)
        for number, own in zip(numbers, joined.split([len(codes[number]) for number in numbers]), strict=True):
            codes[number] = own
    return codes


def _largest(codes: Tensor, group: Any) -> Tensor:
    """Return the largest code at each place over a group's ranks. NCCL computes on GPUs only."""
    import torch.distributed as dist

    moved = codes.to("cuda") if dist.get_backend(group) == "nccl" else codes
    dist.all_reduce(moved, dist.ReduceOp.MAX, group=group)
    return moved.to(codes.device)
