"""An FSDP2 parameter group that reads frozen shards from the other ranks' memory instead of gathering them.

:mod:`lightning_lora.experimental.pull_frozen` says why. FSDP2 gathers trainable parameters as usual: its own gather methods see only
those. Hooks, states and gradients stay FSDP2's.
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

from lightning_lora.experimental.peer_memory import shared_memory, stream_barrier

SMALL = 2**20  # bytes of a full parameter; smaller ones stay resident: launching their copies takes longer than the copies themselves
ALIGNMENT = 256  # bytes; each shard begins at a multiple of it


class PrefetchOrder:
    """The order in which the groups' forward passes ran the last time."""

    def __init__(self) -> None:
        self.last: PullingGroup | None = None
        self.following: dict[PullingGroup, PullingGroup] = {}

    def record(self, group: PullingGroup) -> PullingGroup | None:
        """Record that a group's forward pass begins. Return the group that followed it the last time, None if not known."""
        if self.last is not None:
            self.following[self.last] = group
        self.last = group
        return self.following.get(group)


class PendingGather(NamedTuple):
    """The fields that FSDP2 reads from the result of a pending all-gather."""

    all_gather_event: torch.Event
    all_gather_work: None = None


class PullingGroup(FSDPParamGroup):
    """The parameters of one ``fully_shard`` call. ``pull`` gives FSDP2's own group this class."""

    keep_resident: bool  # True: frozen parameters stay in memory after the backward pass
    order: PrefetchOrder
    sources: dict[FSDPParam, list[Tensor]] | None  # frozen parameter → its shards in the ranks' memory; None until they are shared
    resident: dict[FSDPParam, tuple[int, int]]  # full parameter in memory → the version of this rank's shard when it was read
    copies_done: torch.Event | None = None

    @override
    def pre_forward(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        found = super().pre_forward(module, args, kwargs)
        # A copy waits for work launched before it. To overlap with a block it has to be launched before that block.
        # In the backward pass FSDP2 prefetches early enough by itself; a forward pass recomputed there is not recorded.
        if not is_bw() and (following := self.order.record(self)) is not None:
            FSDPParamGroup._prefetch_unshard(following, "forward")
        return found

    @override
    def unshard(self, async_op: bool = False) -> None:
        if self._all_gather_result is not None or self.is_unsharded:
            return
        ranks = self._all_gather_process_group
        rank = ranks.rank()
        if self.sources is None or any(_moved(param, shards[rank]) for param, shards in self.sources.items()):
            self._share()
        assert self.sources is not None
        if self.sources.keys() - set(self.fsdp_params):  # adapters were removed from the group
            self.sources = {param: shards for param, shards in self.sources.items() if param in self.fsdp_params}
        if self._gathered:
            with self._only_gathered():
                super().unshard(async_op)
            if self._all_gather_result is None:
                return
        stale = {param: shards for param, shards in self.sources.items() if self.resident.get(param) != _version(param)}
        buffers = [_output_buffer(param, ranks.size()) for param in stale]
        stream = self.comm_ctx.get_all_gather_streams(async_op, self._training_state)[1]
        # Buffers are freed on the compute stream, and may be in use there until all work launched before has run.
        stream.wait_stream(self.device_handle.current_stream())
        # Tensors saved for the backward pass get their earlier values again, so their version counters must not change.
        with self.device_handle.stream(stream), torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(buffers)):
            for buffer, shards in zip(buffers, stale.values(), strict=True):
                parts = list(zip(buffer.chunk(len(shards)), shards, strict=True))
                for part, shard in parts[rank:] + parts[:rank]:  # start at this rank: not all ranks read from the same one at once
                    part.copy_(shard)
            self.copies_done = stream.record_event()
        self.resident = self.resident | {param: _version(param) for param in stale}
        self._all_gather_result = self._all_gather_result or cast(Any, PendingGather(self.copies_done))

    @override
    def wait_for_unshard(self) -> None:
        if self._all_gather_result is None:
            return
        if self._gathered:
            with self._only_gathered():
                super().wait_for_unshard()
        self._all_gather_result = None
        self.device_handle.current_stream().wait_event(self.copies_done)
        for param in self.sources or ():
            param.init_unsharded_param()
            param.to_unsharded()
        self._sharded_state = ShardedState.UNSHARDED

    def discard_prefetch(self) -> None:
        """Discard a prefetch that was never consumed, so that it is not mistaken for current data."""
        if self._all_gather_result is not None:
            self.device_handle.current_stream().wait_event(self.copies_done)
            self._all_gather_result, self.resident = None, {}
            for param in self.fsdp_params:
                param.free_unsharded_param()

    @override
    def _to_sharded(self) -> None:
        self.discard_prefetch()
        kept = {}
        if self._training_state != TrainingState.IDLE:  # within a step, not for a caller that is about to write
            frozen = [param for param in self.resident if not param.sharded_param.requires_grad]
            kept = {param: param.all_gather_outputs for param in frozen if self.keep_resident or param.all_gather_outputs[0].nbytes < SMALL}
        for param in self.fsdp_params:
            if param in kept:
                param.all_gather_outputs = []  # nothing to free
            elif self.is_sharded:
                param.free_unsharded_param()  # it was resident until now
        super()._to_sharded()
        for param, outputs in kept.items():
            param.all_gather_outputs = outputs
        self.resident = {param: version for param, version in self.resident.items() if param in kept}

    @property
    def _gathered(self) -> list[FSDPParam]:
        return [param for param in self.fsdp_params if param not in (self.sources or ())]

    @contextmanager
    def _only_gathered(self) -> Iterator[None]:
        """Restrict FSDP2's own methods to the parameters that it gathers."""
        every, self.fsdp_params = self.fsdp_params, self._gathered
        try:
            yield
        finally:
            self.fsdp_params = every

    @torch.inference_mode(False)
    @torch.no_grad()
    def _share(self) -> None:
        """Move the shards of frozen parameters to memory that the other ranks can read. A collective.

        Raises:
            ValueError: FSDP2 would gather something else than the shard's memory.
        """
        ranks = self._all_gather_process_group
        params = [param for param in self.fsdp_params if not param.sharded_param.requires_grad]
        for param in params:
            _check_plain(param)
        ends = list(accumulate(-(-param._sharded_param_data.nbytes // ALIGNMENT) * ALIGNMENT for param in params))
        memory = shared_memory(ends[-1], ranks, self.device) if params else []
        earlier, self.sources, self.resident = self.sources, {}, {}
        for param, start in zip(params, [0, *ends], strict=False):
            old = param._sharded_param_data
            self.sources[param] = [rank[start : start + old.nbytes].view(old.dtype) for rank in memory]
            param._sharded_param_data = self.sources[param][ranks.rank()].copy_(old)
            shard: Any = param.sharded_param
            shard._local_tensor = param._sharded_param_data[: shard._local_tensor.numel()].view(shard._local_tensor.shape)
        stream_barrier(ranks, self.device)
        self.device_handle.synchronize()
        del earlier  # only now: shared memory is freed at once, not after the work launched before


def _check_plain(param: FSDPParam) -> None:
    """Raise ValueError unless FSDP2 would gather the shard's memory unchanged."""
    cast_to = param.param_dtype is not None or param.offload_to_cpu
    if cast_to or hasattr(param._sharded_local_tensor, "fsdp_pre_all_gather") or param.fsdp_placement.dim != 0:
        kind = type(param._sharded_local_tensor).__name__
        raise ValueError(
            f"pull_frozen: {param._param_fqn or param._module_info.param_name} is a {kind} that FSDP2 converts, or shards along another"
            " dimension than the first, so its memory cannot be read directly. pull_frozen=False gathers it."
        )


def _version(param: FSDPParam) -> tuple[int, int]:
    """Return a value that changes with every write to this rank's shard, directly or through the DTensor, but not through ``.data``."""
    return param._sharded_param_data._version, param.sharded_param._version


def _moved(param: FSDPParam, shared: Tensor) -> bool:
    """True if this rank's shard is not the shared one any more: loading assigned another, or the model moved to another device."""
    return param._sharded_param_data.data_ptr() != shared.data_ptr()


def _output_buffer(param: FSDPParam, ranks: int) -> Tensor:
    """Allocate the flat buffer of the full parameter and return it."""
    shard = param._sharded_param_data
    with torch.inference_mode(False):  # an inference tensor could not be used in training later
        param.init_all_gather_outputs([shard.numel()], [shard.dtype], ranks, param.device)
        param.alloc_all_gather_outputs()
    return param.all_gather_outputs[0]
