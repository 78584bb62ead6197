"""A group of parameters of FSDP2 that reads what is frozen from the other ranks' memory, where FSDP2 gathers it.

:mod:`lightning_lora.experimental.pull_frozen` says why. What trains, FSDP2 gathers as ever: its own methods see nothing else. The rest of
what it does, hooks, states, gradients, stays FSDP2's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState, is_bw
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ShardedState
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from typing_extensions import override

from lightning_lora.experimental.peer_memory import meet, shared_memory

SMALL = 2**20  # bytes of a whole parameter: what is smaller stays in memory, for launching its copies costs more than they
ALIGNMENT = 256  # bytes; at which a piece begins


class Order:
    """Which group's forward pass came after which the last time."""

    def __init__(self) -> None:
        self.last: PullingGroup | None = None
        self.following: dict[PullingGroup, PullingGroup] = {}

    def come(self, group: PullingGroup) -> PullingGroup | None:
        """Note that it is a group's turn; whose will be next?"""
        if self.last is not None:
            self.following[self.last] = group
        self.last = group
        return self.following.get(group)


class Pulled(NamedTuple):
    """What FSDP2 asks of a gather that is under way."""

    all_gather_event: torch.Event
    all_gather_work: None = None


class PullingGroup(FSDPParamGroup):
    """What one ``fully_shard`` shards; FSDP2's own group is given this class."""

    keeps: bool  # whether frozen parameters stay in memory after the backward pass
    order: Order
    sources: dict[FSDPParam, list[Tensor]] | None  # the pieces in the ranks' memory; None until they have met
    held: dict[FSDPParam, tuple[int, int]]  # what stayed in memory, as it was at which version of this rank's piece
    pulled: torch.Event | None = None

    @override
    def pre_forward(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        found = super().pre_forward(module, args, kwargs)
        # A copy waits for what was launched before it: to run beside a block it has to be asked for before that block is.
        # In the backward pass FSDP2 asks early enough by itself; a checkpoint's forward pass in there is none of ours.
        if not is_bw() and (following := self.order.come(self)) is not None:
            FSDPParamGroup._prefetch_unshard(following, "forward")
        return found

    @override
    def unshard(self, async_op: bool = False) -> None:
        if self._all_gather_result is not None or self.is_unsharded:
            return
        ranks = self._all_gather_process_group
        rank = ranks.rank()
        if self.sources is None or any(_moved(param, pieces[rank]) for param, pieces in self.sources.items()):
            self._share()
        assert self.sources is not None
        if self.sources.keys() - set(self.fsdp_params):  # adapters that were taken out
            self.sources = {param: pieces for param, pieces in self.sources.items() if param in self.fsdp_params}
        if self._gathered:
            with self._only_gathered():
                super().unshard(async_op)
            if self._all_gather_result is None:
                return
        pulls = {param: pieces for param, pieces in self.sources.items() if self.held.get(param) != _version(param)}
        places = [_place(param, ranks.size()) for param in pulls]
        stream = self.comm_ctx.get_all_gather_streams(async_op, self._training_state)[1]
        # Memory is given back on the stream that computes, and may be in use there until all that was launched before has run.
        stream.wait_stream(self.device_handle.current_stream())
        # Tensors that are saved for the backward pass are filled with what they held before.
        with self.device_handle.stream(stream), torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(places)):
            for place, pieces in zip(places, pulls.values(), strict=True):
                parts = list(zip(place.chunk(len(pieces)), pieces, strict=True))
                for part, piece in parts[rank:] + parts[:rank]:  # not all from the same rank at once
                    part.copy_(piece)
            self.pulled = stream.record_event()
        self.held = self.held | {param: _version(param) for param in pulls}
        self._all_gather_result = self._all_gather_result or cast(Any, Pulled(self.pulled))

    @override
    def wait_for_unshard(self) -> None:
        if self._all_gather_result is None:
            return
        if self._gathered:
            with self._only_gathered():
                super().wait_for_unshard()
        self._all_gather_result = None
        self.device_handle.current_stream().wait_event(self.pulled)
        for param in self.sources or ():
            param.init_unsharded_param()
            param.to_unsharded()
        self._sharded_state = ShardedState.UNSHARDED

    def drop(self) -> None:
        """What was asked for and not used must not pass for what is there later."""
        if self._all_gather_result is not None:
            self.device_handle.current_stream().wait_event(self.pulled)
            self._all_gather_result, self.held = None, {}
            for param in self.fsdp_params:
                param.free_unsharded_param()

    @override
    def _to_sharded(self) -> None:
        self.drop()
        stay = {}
        if self._training_state != TrainingState.IDLE:  # in a step, not for somebody who is about to write
            frozen = [param for param in self.held if not param.sharded_param.requires_grad]
            stay = {param: param.all_gather_outputs for param in frozen if self.keeps or param.all_gather_outputs[0].nbytes < SMALL}
        for param in self.fsdp_params:
            if param in stay:
                param.all_gather_outputs = []  # nothing to free
            elif self.is_sharded:
                param.free_unsharded_param()  # what stayed until now
        super()._to_sharded()
        for param, outputs in stay.items():
            param.all_gather_outputs = outputs
        self.held = {param: version for param, version in self.held.items() if param in stay}

    @property
    def _gathered(self) -> list[FSDPParam]:
        return [param for param in self.fsdp_params if param not in (self.sources or ())]

    @contextmanager
    def _only_gathered(self) -> Iterator[None]:
        """FSDP2's own work is on what it gathers."""
        every, self.fsdp_params = self.fsdp_params, self._gathered
        try:
            yield
        finally:
            self.fsdp_params = every

    @torch.inference_mode(False)
    @torch.no_grad()
    def _share(self) -> None:
        """Move the pieces of what is frozen to memory that the other ranks can read; a collective.

        Raises:
            ValueError: one of them is not what lies in memory.
        """
        ranks = self._all_gather_process_group
        params = [param for param in self.fsdp_params if not param.sharded_param.requires_grad]
        for param in params:
            _check_plain(param)
        ends = list(accumulate(-(-param._sharded_param_data.nbytes // ALIGNMENT) * ALIGNMENT for param in params))
        memory = shared_memory(ends[-1], ranks, self.device) if params else []
        earlier, self.sources, self.held = self.sources, {}, {}
        for param, start in zip(params, [0, *ends], strict=False):
            old = param._sharded_param_data
            self.sources[param] = [rank[start : start + old.nbytes].view(old.dtype) for rank in memory]
            param._sharded_param_data = self.sources[param][ranks.rank()].copy_(old)
            piece: Any = param.sharded_param
            piece._local_tensor = param._sharded_param_data[: piece._local_tensor.numel()].view(piece._local_tensor.shape)
        meet(ranks, self.device)
        self.device_handle.synchronize()
        del earlier  # such memory is given back at once, not after what was launched


def _check_plain(param: FSDPParam) -> None:
    """Whether what FSDP2 would gather is the memory of the piece as it is."""
    cast_to = param.param_dtype is not None or param.offload_to_cpu
    if cast_to or hasattr(param._sharded_local_tensor, "fsdp_pre_all_gather") or param.fsdp_placement.dim != 0:
        kind = type(param._sharded_local_tensor).__name__
        raise ValueError(
            f"pull_frozen=True, but {param._param_fqn} is a {kind} that FSDP2 converts, or cuts along another dimension than the first, and"
            " cannot be read as it lies: leave it out."
        )


def _version(param: FSDPParam) -> tuple[int, int]:
    """Changes whenever this rank's piece is written to, by itself or as part of the DTensor; not through ``.data``."""
    return param._sharded_param_data._version, param.sharded_param._version


def _moved(param: FSDPParam, shared: Tensor) -> bool:
    """Whether this rank's piece is no longer the one that was shared: loading can assign another, a model can go to another device."""
    return param._sharded_param_data.data_ptr() != shared.data_ptr()


def _place(param: FSDPParam, ranks: int) -> Tensor:
    """Where the whole parameter lies, flat."""
    piece = param._sharded_param_data
    with torch.inference_mode(False):  # or it could not train later
        param.init_all_gather_outputs([piece.numel()], [piece.dtype], ranks, param.device)
        param.alloc_all_gather_outputs()
    return param.all_gather_outputs[0]
