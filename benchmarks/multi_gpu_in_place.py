"""An experiment for ``multi_gpu.py``: FSDP2 gathers every parameter straight to its place.

FSDP2 copies a block's pieces into one buffer, gathers that, and copies what came into the parameters: two passes over the block's weights
that the GPU's products wait for. The parameters are cut along their first dimension, so a gathered parameter is the ranks' pieces one
after the other, and can be gathered to where it is used, all of a block's in one launch.

A parameter's memory is given back on the stream that computes, and may be in use there until everything launched before has run, so
that is what a gather waits for. It still runs beside a block if it is asked for before that block is launched: in the backward pass
FSDP2 asks so early by itself, for the forward pass every block is told which one comes next.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from lightning_lora.blocks import repeated_blocks


class Pending(NamedTuple):
    """What FSDP2 asks of a gather that is under way."""

    all_gather_event: torch.Event
    all_gather_work: None = None


class InPlaceGroup(FSDPParamGroup):
    """What one ``fully_shard`` shards."""

    def unshard(self, async_op: bool = False) -> None:
        if self._all_gather_result is not None or self.is_unsharded:
            return
        group = self._all_gather_process_group
        outputs, pieces = [], []
        for param in self.fsdp_params:
            (piece,) = param.all_gather_inputs
            param.init_all_gather_outputs([piece.numel()], [piece.dtype], group.size(), self.device)
            param.alloc_all_gather_outputs()
            outputs += param.all_gather_outputs
            pieces.append(piece)
        _, stream = self.comm_ctx.get_all_gather_streams(async_op, self._training_state)
        stream.wait_stream(self.device_handle.current_stream())
        # Tensors that are saved for the backward pass are filled with what they held before.
        with self.device_handle.stream(stream), torch.autograd._unsafe_preserve_version_counter(tuple(outputs)):
            gather(outputs, pieces, group, self.device)
            self._all_gather_result = Pending(stream.record_event())

    def wait_for_unshard(self) -> None:
        if self._all_gather_result is None:
            return
        if self.comm_ctx.all_gather_state is not None:  # the root's buffer, which the next group drops
            self._wait_all_gather_streams_on_event(self.comm_ctx.all_gather_state.event)
            self.comm_ctx.all_gather_state = None
        self.device_handle.current_stream().wait_event(self._all_gather_result.all_gather_event)
        for param in self.fsdp_params:
            param.init_unsharded_param()
        self._to_unsharded()
        self._all_gather_result = None


def gather(outputs: list[torch.Tensor], pieces: list[torch.Tensor], group: Any, device: torch.device) -> None:
    """One launch for all of them, where the backend has one."""
    if device.type == "cpu":
        for output, piece in zip(outputs, pieces, strict=True):
            dist.all_gather_into_tensor(output, piece, group=group)
        return
    with dist._coalescing_manager(group=group, device=device):
        for output, piece in zip(outputs, pieces, strict=True):
            dist.all_gather_into_tensor(output, piece, group=group)


def gather_in_place(model: Any) -> nn.Module:
    """Have the blocks of a model gather so; the model is itself a unit of FSDP2, their root."""
    blocks: list[Any] = [block for _, block in repeated_blocks(model) if isinstance(block, FSDPModule)]
    for block in blocks:
        group = block._get_fsdp_state()._fsdp_param_group
        assert all(param.fsdp_placement.dim == 0 for param in group.fsdp_params) and group._all_gather_process_group.size() > 1
        group.__class__ = InPlaceGroup
    for unit, following in pairwise([model, *blocks]):
        unit.set_modules_to_forward_prefetch([following])
    return model
