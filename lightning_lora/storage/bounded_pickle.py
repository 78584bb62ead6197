"""Bound the time and the memory that a pickle from an unknown source takes.

``torch.load(weights_only=True)`` runs no code, but a file of 200 bytes may make it hang, crash or fill the memory. A tuple of 45 levels,
each the one below twice, has 2^45 entries to hash. A tuple of 100,000 levels overflows C's stack. Tensors, storages and buffers can be
made of any size, and what is stored once can be copied any number of times. So the objects that an instruction works on are checked
before torch's unpickler, or Python's, carries it out. Nothing is parsed twice, and nothing is read otherwise than torch reads it.
"""

from __future__ import annotations

import codecs
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.utils.torch_private import REBUILD, WeightsOnlyUnpickler, get_layout

ENTRIES = 1000  # most entries of a key, and of a call's arguments, counted through all levels
COPIED = 2**20  # so many entries and characters may be copied by calls in any file

_ALONE = (
    *(pickle.NEWOBJ, pickle.REDUCE, pickle.BUILD, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.MARK, pickle.STOP),
    *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.NONE, pickle.NEWFALSE, pickle.NEWTRUE, pickle.BINPERSID),
    *(pickle.EMPTY_TUPLE, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET, pickle.GLOBAL),
)
_FIXED = (
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.BINFLOAT, pickle.PROTO),
    *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT),
)
#: Instruction → how often torch's unpickler reads after it, for its operand. It knows no other instructions.
_READS = {**dict.fromkeys(_ALONE, 0), **dict.fromkeys(_FIXED, 1), pickle.BINUNICODE: 2, pickle.SHORT_BINSTRING: 2, pickle.LONG1: 2}


def entries(value: Any, levels: tuple[type[Collection[Any]], ...] = (tuple,)) -> Iterator[Any]:
    """Yield what is in nested tuples. Nothing in them is hashed, compared or shown.

    Args:
        value: the outermost tuple, or anything else, which is yielded itself.
        levels: the types whose entries count.

    Raises:
        ValueError: there are more than ``ENTRIES``.
    """
    left: list[Any] = [value]
    count = 0
    while left:
        each = left.pop()
        if isinstance(each, levels):
            count += len(each)
            if count > ENTRIES:
                raise ValueError(f"a key or a call in it has more than {ENTRIES:,} entries, all levels together")
            left.extend(each)
        else:
            yield each


class Keys:
    """The keys of one pickle: how large each is, and how many have one hash. Adding n keys of one hash takes n² steps."""

    def __init__(self) -> None:
        self.hashes = Counter[tuple[int, int]]()  # (container, hash) → keys

    def check(self, container: object, keys: Iterable[Any]) -> bool:
        """Check values before they are hashed.

        Args:
            container: what they are added to.
            keys: the values.

        Raises:
            ValueError: one has more than ``ENTRIES`` entries, or more than ``ENTRIES`` have one hash.
        """
        for key in keys:
            if isinstance(key, tuple) or (
                isinstance(key, int) and key.bit_length() > 60
            ):  # others have hashes of their own, or secret ones
                for _ in entries(key):
                    pass
                same = id(container), hash(key)
                self.hashes[same] += 1
                if self.hashes[same] > ENTRIES:
                    raise ValueError(f"it has more than {ENTRIES:,} keys of one hash")
        return True


class Calls:
    """The calls of one pickle: which there may be, and how much they copy all together.

    Args:
        allowed: function → whether it may be called with a tuple of arguments.
    """

    def __init__(self, allowed: dict[Any, Callable[[tuple[Any, ...]], bool]]) -> None:
        self.allowed, self.copied = allowed, 0

    def check(self, function: Any, arguments: Any, read: int) -> None:
        """Check a call before it is made.

        Args:
            function: what is called.
            arguments: what it is called with.
            read: how many bytes of the pickle have been read.

        Raises:
            ValueError: ``torch.save`` never writes this call, or the calls have copied more than was read.
        """
        if isinstance(function, (tuple, list, dict, Tensor)) or not callable(function) or not isinstance(arguments, tuple):
            raise ValueError(f"it calls a {type(function).__name__}")
        sized = [value for value in entries(arguments) if isinstance(value, (str, bytes, bytearray, list, dict, set))]
        self.copied += sum(map(len, sized))
        if self.copied > read + COPIED:
            raise ValueError(f"its calls copy more than {self.copied:,} entries, and it has {read:,} bytes")
        if function not in self.allowed or not self.allowed[function](arguments):
            kinds = ", ".join(type(argument).__name__ for argument in arguments)
            raise ValueError(f"it calls {function.__module__}.{function.__qualname__}({kinds}), which torch.save never writes")
        if function is REBUILD["from_type_v2"]:  # a call of its first argument
            self.check(arguments[0], arguments[2], read)


def _of(*kinds: type) -> Callable[[tuple[Any, ...]], bool]:
    return lambda arguments: all(isinstance(argument, kinds) for argument in arguments)


def _any(arguments: tuple[Any, ...]) -> bool:
    return all(True for _ in entries(arguments, (tuple, list)))  # an error of torch's may show them


def _set(arguments: tuple[Any, ...]) -> bool:
    return all(isinstance(argument, list) and Keys().check(argument, argument) for argument in arguments)


def _bytes(arguments: tuple[Any, ...]) -> bool:
    return not arguments or isinstance(arguments[0], (bytes, str))  # a number would be the size


def _encode(arguments: tuple[Any, ...]) -> bool:
    return len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1"  # "hex" doubles what it encodes


def _stored(arguments: tuple[Any, ...]) -> bool:
    """The tensors do not repeat what is stored, because they are read whole at once."""
    tensors = [value for value in entries(arguments, (tuple, list)) if isinstance(value, Tensor)]
    return all(tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes() for tensor in tensors)


def _nested(arguments: tuple[Any, ...]) -> bool:
    """Every place is in the buffer, which torch does not check."""
    if len(arguments) != 4 or not all(isinstance(each, Tensor) for each in arguments) or not _stored(arguments):
        return False
    buffer, sizes, strides, offsets = (each.to(torch.float64) for each in arguments)  # integers would overflow
    if not sizes.numel():
        return True
    last = offsets + ((sizes - 1) * strides).sum(-1)
    return bool(min(sizes.min(), strides.min(), offsets.min()) >= 0 and last.max() < buffer.numel())


def _subclass(arguments: tuple[Any, ...]) -> bool:
    """A class that the user trusts: torch's own would read memory that is not theirs."""
    return bool(arguments) and arguments[0] in torch.serialization.get_safe_globals() and _any(arguments)


def _state(arguments: tuple[Any, ...]) -> bool:
    """The last argument is the state of a tensor, as ``__reduce_ex__`` gives it."""
    state = arguments[-1] if arguments else ()
    parts = state if isinstance(state, tuple) else (state,)
    return _any(arguments) and all(part is None or _attributes(part, Tensor) for part in parts)


def _attributes(state: Any, cls: type) -> bool:
    """A state that replaces no method or property of the class, such as ``items`` of a state dict."""
    return isinstance(state, dict) and all(isinstance(name, str) and not hasattr(cls, name) for name in state)


_CALLS: dict[Any, Callable[[tuple[Any, ...]], bool]] = {
    **dict.fromkeys([*REBUILD.values(), nn.Parameter], _any),
    **{OrderedDict: _of(), Counter: _of(dict), torch.Size: _of(tuple), torch.device: _of(str, int), get_layout: _of(str)},
    **{complex: _of(float), set: _set, bytearray: _bytes, codecs.encode: _encode},
    REBUILD["parameter_with_state"]: _state,
    REBUILD["from_type_v2"]: lambda arguments: len(arguments) == 4 and _state(arguments),
    REBUILD["sparse_tensor"]: _stored,
    REBUILD["nested_tensor"]: _nested,
    REBUILD["wrapper_subclass"]: _subclass,
}


class BoundedUnpickler(WeightsOnlyUnpickler):
    """torch's unpickler for ``weights_only=True``, with a check before each instruction that hashes, calls or sets a state."""

    def __init__(self, file: Any, **options: Any) -> None:
        super().__init__(file, **options)
        self.trusted = {each[0] if isinstance(each, tuple) else each for each in torch.serialization.get_safe_globals()}
        self.calls = Calls(_CALLS | dict.fromkeys(self.trusted, lambda arguments: True))
        self.keys = Keys()
        self.operands = self.count = 0  # operands that are still to be read; bytes that were read
        self.read_file, self.read = file.read, self.read_checked

    def read_checked(self, size: int) -> bytes:
        """Read what torch asks for: an instruction, which is checked, or an operand of the last one."""
        data: bytes = self.read_file(size)
        self.count += len(data)
        if self.operands:
            self.operands -= 1
        elif data:
            if data not in _READS:
                raise ValueError(f"Unsupported operand {data[0]}")
            self.operands = _READS[data]
            if data in _CHECKS:
                _CHECKS[data](self)
        return data

    def check_call(self) -> None:
        """Check a call of what lies on the stack."""
        function, arguments = self.stack[-2:]
        self.calls.check(function, arguments, self.count)

    def check_state(self) -> None:
        """Check the state that an object is given."""
        made, state = self.stack[-2:]
        if type(made) not in self.trusted and not (type(made) is OrderedDict and _attributes(state, OrderedDict)):
            raise ValueError(f"it sets the state of a {type(made).__name__}, which torch.save never writes")


_CHECKS: dict[bytes, Callable[[BoundedUnpickler], object]] = {
    pickle.REDUCE: BoundedUnpickler.check_call,
    pickle.NEWOBJ: BoundedUnpickler.check_call,
    pickle.BUILD: BoundedUnpickler.check_state,
    pickle.SETITEM: lambda unpickler: unpickler.keys.check(unpickler.stack[-3], unpickler.stack[-2:-1]),
    pickle.SETITEMS: lambda unpickler: unpickler.keys.check(unpickler.metastack[-1][-1], unpickler.stack[::2]),
    pickle.BINPERSID: lambda unpickler: unpickler.keys.check(None, unpickler.stack[-1:]),
}
