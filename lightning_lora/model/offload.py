"""Keep what gradient checkpointing saves in host memory until the backward pass needs it.

Gradient checkpointing saves each block's input. On long rows these are a large part of a step's memory: 8.6 GB for 32,768 tokens of an 8B
model. Here each is copied to pinned host memory while the next blocks compute, and copied back while the blocks behind it go backward. The
copies run on a stream of their own. Values do not change.

Torch's ``saved_tensors_hooks`` tell what is saved. They are on during the forward pass of the module that calls the blocks. What a
checkpointed block saves inside does not arrive here, since the checkpoint drops it. (``torch.autograd.graph.save_on_cpu`` copies on the
stream that computes, which then waits for each copy.)
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from lightning_lora.utils.blocks import BLOCKS, repeated_blocks
from lightning_lora.utils.sharding import local_tensor

MINIMUM = 2**20  # bytes; smaller tensors stay where they are
HELD = 2  # of how many of the last blocks the tensors stay on the device while they are copied


def offload_activations(model: nn.Module) -> Offloading:
    """Move what the blocks of a model save for the backward pass to host memory, from its next forward pass on.

    Switch gradient checkpointing on. Without it, everything that the blocks save is moved, which takes longer than to compute it again.
    Tensors below 1 MiB, integers, parameters, buffers and tensor subclasses stay on the device. The pinned host memory is as large as
    what is moved; torch rounds each tensor up to a power of two.

    Args:
        model: any module with repeated blocks (:func:`~lightning_lora.utils.blocks.repeated_blocks`), wrapped or not, not compiled as a
            whole. Blocks may be compiled.

    Returns:
        A handle that counts what was moved; its ``remove()`` ends the offloading.

    Raises:
        ValueError: the model has no repeated blocks.

    Examples:
        >>> model = apply_lora(model)
        >>> checkpoints, handle = checkpoint_layers(model), offload_activations(model)
        >>> model(**batch, use_cache=False).loss.backward()
        >>> handle.remove()
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks whose activations could be offloaded ({BLOCKS}): leave offload out."
        )
    lists = Counter(name.rpartition(".")[0] for name, _ in blocks)
    callers: Counter[nn.Module] = Counter()
    for name, count in lists.items():
        callers[model.get_submodule(name.rpartition(".")[0])] += count
    return Offloading(callers)


def copy_stream(device: torch.device) -> Any:
    """Return a new stream of a device for copies beside what it computes."""
    return torch.get_device_module(device).Stream(device=device) if device.type != "cpu" else torch.cpu.Stream()


class Offloading:
    """The offloading of the blocks that some modules call.

    Attributes:
        blocks: how many blocks they call.
        tensors: how many tensors were moved so far.
        bytes: their size.
    """

    def __init__(self, callers: Counter[nn.Module]) -> None:
        self.blocks = callers.total()
        self.tensors = self.bytes = 0
        self._callers = callers
        self._each, self._before = 1, 0  # tensors that a block moves, as in the last pass; tensors moved before this pass
        self._streams: dict[torch.device, Any] = {}
        self._last: weakref.ref[_Moved] | None = None
        self._held: deque[weakref.ref[_Moved]] = deque()
        self._fixed = [owned for caller in callers for m in caller.modules() for owned in (m._parameters, m._buffers)]
        self._hooks = saved_tensors_hooks(self._pack, _unpack)  # one pair: compiled blocks are compiled again for another
        self._handles = [handle for caller in callers for handle in self._watch(caller)]

    def remove(self) -> None:
        """End the offloading. A backward pass that is still to come works."""
        for handle in self._handles:
            handle.remove()

    def _watch(self, caller: nn.Module) -> Iterator[RemovableHandle]:
        yield caller.register_forward_pre_hook(self._begin)
        yield caller.register_forward_hook(self._end, always_call=True)

    def _begin(self, caller: nn.Module, inputs: Any) -> None:
        self._last, self._before = None, self.tensors
        self._hooks.__enter__()

    def _end(self, caller: nn.Module, inputs: Any, output: Any) -> None:
        self._hooks.__exit__()
        self._each = (self.tensors - self._before) // self._callers[caller] or self._each

    def _pack(self, tensor: Tensor) -> Tensor | _Moved:
        plain = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.is_floating_point()
        if not plain or tensor.nbytes < MINIMUM or self._is_fixed(tensor):
            return tensor
        moved = _Moved(tensor, self._stream(tensor.device), self._last, self._each)
        self.tensors, self.bytes = self.tensors + 1, self.bytes + tensor.nbytes
        self._last = weakref.ref(moved)
        self._held.append(self._last)
        while len(self._held) > HELD * self._each:  # a block may save several tensors at once, none of them copied yet
            earlier = self._held.popleft()()
            if earlier is not None:
                earlier.release()
        return moved

    def _is_fixed(self, tensor: Tensor) -> bool:
        """True for a parameter or buffer, or a view of one. Its address is looked up now, because sharding changes it."""
        address = _address(tensor)
        return any(_address(local_tensor(own)) == address for own in chain(*(owned.values() for owned in self._fixed)) if own is not None)

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = copy_stream(device)
        return self._streams[device]


class _Moved:
    """A saved tensor, on its way to host memory and back.

    Args:
        tensor: on the device.
        stream: the stream of the copies.
        before: the tensor that was moved before, which the backward pass needs next.
        ahead: how many of those to copy back ahead of their use.
    """

    def __init__(self, tensor: Tensor, stream: Any, before: weakref.ref[_Moved] | None, ahead: int) -> None:
        self._device, self._stream, self._before, self._ahead = tensor.device, stream, before, ahead
        self._used = False
        self._module = torch.get_device_module(tensor.device)
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type != "cpu")
        self._source: Tensor | None = tensor.detach()  # without the graph, which holds this object
        self._version = tensor._version
        self._back: Tensor | None = None
        self._copied = self._copy(tensor, self._host)

    def release(self) -> None:
        """Give the device's memory up, once it is copied.

        Raises:
            RuntimeError: The tensor was changed in place since it was saved.
        """
        if self._source is None:
            return
        self._wait(self._copied)
        if self._source._version != self._version:
            raise RuntimeError(
                f"a tensor of shape {list(self._source.shape)} was changed in place after it was saved for the backward pass: leave"
                " offload='activations' out, or do not change it in place."
            )
        self._source = None

    def fetch(self) -> None:
        """Begin to copy it back, unless that was done."""
        if self._source is None and self._back is None and not self._used:
            self._back = torch.empty_like(self._host, device=self._device)  # of the computing stream, which frees it too
            self._copied = self._copy(self._host, self._back)

    def get(self) -> Tensor:
        """Return the tensor on the device, and begin to copy those before back."""
        self._used = False
        self.fetch()
        self._used, earlier = True, self
        for _ in range(self._ahead):
            before = earlier._before() if earlier._before is not None else None
            if before is None:
                break
            before.fetch()
            earlier = before
        if self._source is not None:
            return self._source
        self._wait(self._copied)
        back, self._back = self._back, None
        assert back is not None
        return back

    def _copy(self, source: Tensor, target: Tensor) -> Any:
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def _wait(self, event: Any) -> None:
        self._module.current_stream(self._device).wait_event(event)


def _unpack(saved: Tensor | _Moved) -> Tensor:
    return saved.get() if isinstance(saved, _Moved) else saved


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
