"""Count what a training step keeps in memory, by running it on the meta device, where tensors have shapes and no bytes.

A ``TorchDispatchMode`` sees each storage made and freed, ``saved_tensors_hooks`` say what is saved for the backward pass. Adapted layers
take the ways of a GPU with kernels (:func:`lightning_lora.ops.backends.planned`): their operators have shape functions. Attention is
torch's flash kernel, which keeps no scores.

A compiler saves less: it makes elementwise results again from what they were made of. So of a block it keeps the results of products,
attention and our operators behind its saved tensors, and the block's input.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_lora.ops import backends
from lightning_lora.utils.blocks import repeated_blocks
from lightning_lora.utils.torch_private import dispatch_mode, flash_attention, operator_name, storage_key, tensors_in

OUTSIDE = -1  # the number of what is in no block
# Parts of the names of operators whose results a compiler keeps rather than compute them again.
_KEPT = ("mm", "linear", "convolution", "embedding", "index", "sort", "topk", "attention")
# Operators of ours that need room while they run, as multiples of the widest tensor they are given: the gradients of h, gate and up.
_SCRATCH = {"gated_mlp_backward": 3}


@dataclass(eq=False)
class Storage:
    """A storage that the step made: its bytes, by an attention kernel or not, and what a compiler keeps in its place."""

    bytes: int
    attention: bool = False
    roots: frozenset[Storage] = frozenset()


@dataclass(frozen=True)
class Saved:
    """What one step keeps, in bytes.

    Attributes:
        blocks: of each repeated block what it saves for the backward pass, its input included.
        inputs: of each block its input.
        attention: of each block the results of its attention kernel.
        outside: what everything outside the blocks saves.
        output: what the output layer reads.
        backward: the most that the backward pass needs beside what is saved and the trained parameters' gradients.
    """

    blocks: tuple[int, ...]
    inputs: tuple[int, ...]
    attention: tuple[int, ...]
    outside: int
    output: int
    backward: int


def count_saved(model: nn.Module, forward: Callable[[], Tensor], compiled: bool) -> Saved:
    """Run one step of a model on the meta device, and count.

    Args:
        model: on the meta device, in training mode, adapted.
        forward: gives what the output layer reads, the last hidden states.
        compiled: each repeated block is compiled.

    Raises:
        ValueError: the model reads values, which the meta device does not have.
    """
    blocks = [block for _, block in repeated_blocks(model)]
    meter = _Meter(model, compiled)
    try:
        with ExitStack() as stack:
            stack.enter_context(backends.planned(compiled))
            for handle in chain.from_iterable(meter.watch(index, block) for index, block in enumerate(blocks)):
                stack.callback(handle.remove)
            stack.enter_context(_OnMeta())
            stack.enter_context(meter)
            with saved_tensors_hooks(meter.save, lambda tensor: tensor):
                output = forward()
            meter.begin_backward()
            output.backward(torch.empty_like(output))
        return meter.result(len(blocks), output.nbytes)  # while the parameters hold their gradients
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error).lower():
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(f"{type(model).__name__} cannot run on the meta device, where memory is estimated: {reason}") from error
    finally:
        for parameter in model.parameters():
            parameter.grad = None


class _OnMeta(TorchFunctionMode):
    """Compute attention and dropout by the GPU's kernels, and answer questions about data as for rows of one document without padding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return flash_attention(*args[:3])
        if func is F.dropout and args[0].is_meta:
            return _dropout(*args, **(kwargs or {}))
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        for kind in types:
            if not issubclass(kind, Tensor):  # a LowRankSum: what it calls comes here too
                with self:
                    return kind.__torch_function__(func, types, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Keep a mask of one byte an entry, as the GPU's kernel does; elsewhere torch keeps one in the input's dtype."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


_DispatchMode: Any = dispatch_mode()


class _Meter(_DispatchMode):
    """Knows of each storage what made it, and lists when each comes and goes."""

    def __init__(self, model: nn.Module, compiled: bool) -> None:
        super().__init__()
        self._backward, self._compiled, self._block = False, compiled, OUTSIDE
        self._fixed = {storage_key(tensor) for tensor in chain(model.parameters(), model.buffers())}
        self._known: dict[int, Storage] = {}
        self._saved: dict[int, set[Storage]] = defaultdict(set)
        self._inputs: dict[int, int] = {}
        self._events: list[tuple[Storage, int]] = []  # of the backward pass: what comes (1) and goes (-1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        namespace, _, name = operator_name(func).partition("::")
        outside = self._block == OUTSIDE and not self._backward
        kept = outside or namespace == "lightning_lora" or any(part in name for part in _KEPT)
        given = tensors_in((args, kwargs))
        if name in _SCRATCH:
            scratch = Storage(_SCRATCH[name] * max(t.nbytes for t in given if storage_key(t) not in self._fixed))
            self._events += [(scratch, 1), (scratch, -1)]
        sources = [self._known[storage_key(t)] for t in given if storage_key(t) in self._known]
        roots = frozenset(root for source in sources for root in source.roots)
        for result in tensors_in(results):
            if storage_key(result) not in self._fixed and storage_key(result) not in self._known:
                self._made(result, "attention" in name, None if kept else roots)
        return results

    def _made(self, result: Tensor, attention: bool, roots: frozenset[Storage] | None) -> None:
        held, key = result.untyped_storage(), storage_key(result)
        storage = Storage(held.nbytes(), attention)
        storage.roots = frozenset([storage]) if roots is None else roots
        self._known[key] = storage
        seen = self._backward and (roots is None or not self._compiled)
        if seen:
            self._events.append((storage, 1))
        weakref.finalize(held, self._freed, key, storage if seen else None)

    def _freed(self, key: int, storage: Storage | None) -> None:
        self._known.pop(key, None)
        if storage is not None:
            self._events.append((storage, -1))

    def begin_backward(self) -> None:
        """What comes from now on is of the backward pass."""
        self._backward = True

    def save(self, tensor: Tensor) -> Tensor:
        """Note what autograd saves."""
        storage = self._known.get(storage_key(tensor))
        if storage is not None:
            self._saved[self._block] |= storage.roots if self._compiled else {storage}
        return tensor

    def watch(self, index: int, block: nn.Module) -> Iterator[RemovableHandle]:
        """Know when the block runs. Its input and its output are there whole, compiled or not."""

        def begin(module: Any, args: Any, kwargs: Any) -> None:
            self._block = index
            self._inputs[index] = max((t.nbytes for t in tensors_in((args[:1], kwargs.get("hidden_states")))), default=0)

        def end(module: Any, args: Any, output: Any) -> None:
            self._block = OUTSIDE
            for result in tensors_in(output):
                if storage_key(result) in self._known:
                    storage = self._known[storage_key(result)]
                    storage.roots = frozenset([storage])

        yield block.register_forward_pre_hook(begin, with_kwargs=True)
        yield block.register_forward_hook(end)

    def result(self, blocks: int, output: int) -> Saved:
        """Return the sums. What several blocks save counts for the first of them."""
        counted: set[Storage] = set()
        sums, attention = [], []
        for index in range(blocks):
            own = self._saved[index] - counted
            counted |= own
            sums.append(sum(storage.bytes for storage in own))
            attention.append(sum(storage.bytes for storage in own if storage.attention))
        outside = sum(storage.bytes for storage in self._saved[OUTSIDE] - counted)
        inputs = tuple(self._inputs.get(index, 0) for index in range(blocks))
        gone = {storage for storage, sign in self._events if sign < 0}  # the others are the parameters' gradients
        backward = max(accumulate(sign * storage.bytes for storage, sign in self._events if storage in gone), default=0)
        return Saved(tuple(sums), inputs, tuple(attention), outside, output, backward)
