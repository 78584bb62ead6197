"""Keep the frozen weights of a model's blocks in host memory, and copy each block's to the device while the block before it computes.

For models larger than the device. The device holds the weights of two blocks, and everything else: embeddings, heads, norms, adapters,
activations. A step takes as long as before if a block computes longer than its weights take to copy, as it does with many tokens.

Copies run on a stream of their own, forward in the blocks' order and backward in the reverse. While a block's weights are away, its
parameters are the pinned tensors in host memory, so whoever reads one between two passes (checkpoints, merges, exports) reads its values.
What autograd saves of a weight, views too, stays valid: a weight comes back into the same storage, which has no memory while it is away.
(FSDP2's ``CPUOffloadPolicy`` would need a process group, turn parameters into DTensors, and move the adapters to the CPU too.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from lightning_lora.model.offload import copy_stream
from lightning_lora.quantization.formats import format_of
from lightning_lora.utils.blocks import BLOCKS, repeated_blocks
from lightning_lora.utils.names import join
from lightning_lora.utils.sharding import is_sharded
from lightning_lora.utils.torch_private import map_tensors

MINIMUM = 2**20  # bytes; smaller weights stay on the device


def offload_frozen(model: nn.Module, device: torch.device | str) -> FrozenOffloading:
    """Move the frozen weights of a model's blocks to host memory. From its next pass on they come to the device a block ahead.

    Quantize the model and apply LoRA before. Weights below 1 MiB stay on the device. ``model.to(device)`` leaves those in host memory
    where they are. Torch rounds each pinned tensor up to a power of two. With gradient checkpointing each weight is copied twice per step.

    Args:
        model: any module with repeated blocks (:func:`~lightning_lora.utils.blocks.repeated_blocks`) on one device, in host memory or on
            the device. Its blocks may be compiled.
        device: where it computes.

    Returns:
        A handle. Its ``remove()`` ends the offloading, and leaves the weights in host memory.

    Raises:
        ValueError: the model has no repeated blocks, their weights are sharded, or of a format that consists of several tensors.

    Examples:
        >>> handle = offload_frozen(apply_lora(model), "cpu")  # "cuda" where there is a GPU
        >>> model(**batch).loss.backward()
        >>> handle.remove()
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no repeated blocks whose weights could be offloaded ({BLOCKS}): leave offload out.")
    for fqn, block in blocks:
        _check(fqn, block)
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)  # tied weights stay on the device
    places = []
    for _, block in blocks:
        block.to(device)  # whatever belongs to a weight moves as its library moves it
        frozen = [p for p in block.parameters() if not p.requires_grad and p.nbytes >= MINIMUM and users[id(p)] == 1]
        places.append(_Place(block, frozen, torch.device(device)))
    return FrozenOffloading(places)


def _check(fqn: str, block: nn.Module) -> None:
    """Raise ValueError for a block that cannot be offloaded."""
    if "_apply" in vars(block):
        raise ValueError(f"{fqn} is offloaded already: call remove() on the handle first.")
    for name, module in block.named_modules():
        packing, what = format_of(module), join(fqn, name)
        for parameter in module.parameters(recurse=False):
            if is_sharded(parameter):
                raise ValueError(f"{what} is sharded: give FSDP its own offloading (CPUOffloadPolicy), or use one device.")
            if hasattr(parameter, "__tensor_flatten__") or (packing is not None and not packing.shards):
                raise ValueError(
                    f"{what} has a weight that consists of several tensors ({type(module).__name__}), and cannot be offloaded: quantize to"
                    " 'fp8' or 'nf4'."
                )


class _OfThisModel:
    """Belongs to one model in this process."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a model whose weights are offloaded cannot be copied or pickled: call remove() on the handle first.")


class FrozenOffloading(_OfThisModel):
    """The offloading of some blocks.

    Attributes:
        bytes: the size of the weights in host memory.
    """

    def __init__(self, places: list[_Place]) -> None:
        self.bytes = sum(p.nbytes for place in places for p in place.weights)
        self._places = places
        self._current, self._near = -1, set[int]()  # the block that computes; the blocks that are on the device, or on their way
        need = torch.compiler.disable(self._need)
        self._handles = []
        for index, place in enumerate(places):
            self._handles.append(place.block.register_forward_pre_hook(torch.compiler.disable(partial(_before, need, index))))
            self._handles.append(place.block.register_forward_hook(torch.compiler.disable(partial(_after, need, index))))
            place.block.__dict__["_apply"] = partial(_apply_to_rest, place)

    def rest(self) -> None:
        """Move all weights to host memory until the next pass. Call it before weights are changed."""
        for index in self._near:
            self._places[index].leave()
        self._current, self._near = -1, set()

    def remove(self) -> None:
        """End the offloading. The weights stay in host memory: ``model.to(device)`` moves them."""
        self.rest()
        for handle in self._handles:
            handle.remove()
        for place in self._places:
            place.block.__dict__.pop("_apply", None)

    def _need(self, index: int) -> None:
        """Let the computing stream wait for a block's weights, and begin to copy those of the block that comes next."""
        before, self._current = self._current, index
        if index == before:  # a checkpointed block computes again
            return
        ahead = index + 1 if index > before or index == 0 else index - 1
        if ahead == len(self._places):  # the last one, which goes backward next
            ahead = index - 1
        for other in self._near - {index, ahead}:
            self._places[other].leave()
        self._near = {index, ahead}
        self._places[index].arrive()
        self._places[ahead].fetch()


def _before(need: Callable[[int], None], index: int, block: nn.Module, inputs: Any) -> None:
    need(index)


def _after(need: Callable[[int], None], index: int, block: nn.Module, inputs: Any, output: Any) -> None:
    """Have the weights on the device when the backward pass reaches the block."""
    found: list[Tensor] = []
    map_tensors(Tensor, found.append, output)
    tracked = [tensor for tensor in found if tensor.requires_grad]
    if tracked and torch.is_grad_enabled():
        register_multi_grad_hook(tracked, lambda _: need(index), mode="any")


class _Place(_OfThisModel):
    """A block's weights: in host memory, on their way to the device, or there.

    Args:
        block: the block.
        weights: its parameters to move.
        device: where it computes.
    """

    def __init__(self, block: nn.Module, weights: list[nn.Parameter], device: torch.device) -> None:
        self.block, self.weights, self._device = block, weights, device
        self._stream, self._module = copy_stream(device), torch.get_device_module(device)
        self._there = [torch.empty_like(p.data, device=device) for p in weights]  # one storage each, for as long as it is offloaded
        self._homes: list[Tensor] = []  # in host memory, while they are on the device
        self._versions: list[int] = []
        self._copied: Any = None
        for parameter, there in zip(weights, self._there, strict=True):
            there.untyped_storage().resize_(0)
            home = torch.empty_like(parameter.data, device="cpu", pin_memory=device.type == "cuda")  # pinned at once: not through a copy
            parameter.data = home.copy_(parameter.data)

    def fetch(self) -> None:
        """Begin to copy them to the device."""
        if self._homes or not self.weights:
            return
        self._homes, self._versions = [parameter.data for parameter in self.weights], [parameter._version for parameter in self.weights]
        for home, there in zip(self._homes, self._there, strict=True):
            there.untyped_storage().resize_(home.nbytes)  # memory of the computing stream, which frees it too
        self._stream.wait_stream(self._module.current_stream(self._device))  # it may still compute with that memory
        with self._module.stream(self._stream):
            for home, there in zip(self._homes, self._there, strict=True):
                there.copy_(home, non_blocking=True)
            self._copied = self._stream.record_event()

    def arrive(self) -> None:
        """Let the parameters be those on the device, for what is computed from now on."""
        self.fetch()
        if self.weights:
            self._module.current_stream(self._device).wait_event(self._copied)
        for parameter, there in zip(self.weights, self._there, strict=True):
            parameter.data = there

    def leave(self) -> None:
        """Let the parameters be those in host memory, and give the device's memory up."""
        if not self._homes:
            return
        self._module.current_stream(self._device).wait_event(self._copied)
        for parameter, home, there, version in zip(self.weights, self._homes, self._there, self._versions, strict=True):
            if parameter._version != version:  # somebody wrote to it
                home.copy_(there)
            parameter.data = home
            there.untyped_storage().resize_(0)
        self._homes = []


def _apply_to_rest(place: _Place, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Move or cast a block (``to``, ``cuda``, ``half`` …), but move no weight that is offloaded.

    Raises:
        RuntimeError: the weights would be cast.
    """
    offloaded = {id(parameter) for parameter in place.weights}

    def moved(tensor: Tensor) -> Tensor:
        if id(tensor) not in offloaded:
            return fn(tensor)
        if fn(torch.empty(0, dtype=tensor.dtype)).dtype != tensor.dtype:
            raise RuntimeError(f"a {type(place.block).__name__} cannot be cast while its weights are offloaded: cast it before.")
        return tensor.data

    return type(place.block)._apply(place.block, moved, recurse)
