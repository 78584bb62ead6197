"""Pickles that torch.load(weights_only=True) reads for ever, or that make it crash or fill the memory, written byte by byte."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path


def name(module: str, attribute: str) -> bytes:
    return b"c%s\n%s\n" % (module.encode(), attribute.encode())


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def many(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + many(*arguments) + b"R"


def mapping(*keys_and_values: bytes) -> bytes:
    return b"}(" + b"".join(keys_and_values) + b"u"


def listed(*values: bytes) -> bytes:
    return b"](" + b"".join(values) + b"e"


def kept(place: int) -> bytes:
    return b"r" + struct.pack("<I", place)


def again(place: int) -> bytes:
    return b"j" + struct.pack("<I", place)


def stored(key: bytes = text("0"), numel: int = 4, kind: str = "FloatStorage", where: bytes = text("cpu")) -> bytes:
    return many(text("storage"), name("torch", kind), key, where, number(numel)) + b"Q"


def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, storage: bytes = stored()) -> bytes:
    numbers = number(offset), many(*map(number, size)), many(*map(number, stride))
    return called(rebuild("tensor_v2"), storage, *numbers, b"\x89", called(name("collections", "OrderedDict")))


def rebuild(what: str) -> bytes:
    return name("torch._utils", f"_rebuild_{what}")


WHOLE, REPEATED = tensor((4,), (1,)), tensor((2**31,), (0,))
#: Each level is the one below twice: 2^45 entries, which are hashed one by one.
DOUBLED = b")" + b"".join(kept(place) + again(place) + b"\x86" for place in range(45))
#: Hashing them takes a call of C for each level.
DEEP = b")" + b"\x85" * 100_000
LONG = text("x" * 2**16)
ODICT, SET, SIZE = name("collections", "OrderedDict"), name("builtins", "set"), name("torch", "Size")


def copied(value: bytes, *call: bytes) -> bytes:
    """Stores a value once, and calls a function with it again and again."""
    function, *more = call
    return listed(value + kept(0), *(called(function, again(0), *more) for _ in range(3000)))


def sparse(index: int, size: tuple[int, ...] = (2,), stride: tuple[int, ...] = (1,)) -> bytes:
    layout = called(name("torch.serialization", "_get_layout"), text("torch.sparse_coo"))
    places = tensor((1, *size), (1, *stride), storage=stored(text(str(index)), 2, "LongStorage"))
    return called(rebuild("sparse_tensor"), layout, many(places, tensor(size, stride), many(number(5)), b"\x89"))


def nested(offset: int) -> bytes:
    def longs(*size: int) -> bytes:
        return tensor(size, (1,) * len(size), storage=stored(text("2"), 4, "LongStorage"))

    return called(
        rebuild("nested_tensor"), WHOLE, longs(1, 1), longs(1, 1), tensor((1,), (1,), offset, stored(text("2"), 4, "LongStorage"))
    )


#: What it is → a pickle, and what the error says of it.
PICKLES: dict[str, tuple[bytes, str]] = {
    **{
        f"{what} of {kind}": (make(value), "more than 1,000 entries")
        for kind, value in {"doubled tuples": DOUBLED, "deep tuples": DEEP}.items()
        for what, make in {
            "a key": lambda value: b"}" + value + b"Ns",
            "several keys": lambda value: mapping(value, b"N"),
            "a set": lambda value: called(SET, listed(value)),
            "a storage's key": lambda value: stored(value),
            "a layout": lambda value: called(name("torch.serialization", "_get_layout"), value),
        }.items()
    },
    "a counter of a list": (called(name("collections", "Counter"), listed(DOUBLED)), r"calls collections\.Counter\(list\)"),
    "a dict of pairs": (called(ODICT, listed(many(DOUBLED, b"N"))), r"calls collections\.OrderedDict\(list\)"),
    "a call of a tuple": (DOUBLED + b")R", "calls a tuple"),
    "an object of a tuple": (DOUBLED + b")\x81", "calls a tuple"),
    "a state of lists": (
        called(rebuild("parameter_with_state"), WHOLE, b"\x89", called(ODICT), many(listed(DOUBLED), b"N", b"N")),
        "more than 1,000 entries|calls torch",
    ),
    "keys of one hash": (mapping(*(number(each * (2**61 - 1)) + b"N" for each in range(1, 3000))), "more than 1,000 keys of one hash"),
    "text encoded again": (copied(LONG, name("_codecs", "encode"), text("latin1")), "its calls copy more than"),
    "a buffer copied": (copied(called(name("_codecs", "encode"), LONG, text("latin1")), name("builtins", "bytearray")), "copy more than"),
    "a set copied": (copied(listed(*map(number, range(2**12))), SET), "copy more than"),
    "a size of a list": (copied(listed(b"K\1" * 2**12), SIZE), r"calls torch\.Size\(list\)"),
    "a tensor of a number": (called(name("torch", "FloatTensor"), number(10**12)), r"calls torch\.FloatTensor\(int\)"),
    "a storage of a number": (called(name("torch.storage", "UntypedStorage"), number(10**12)), "calls torch.storage.UntypedStorage"),
    "a new storage": (name("torch.storage", "UntypedStorage") + many(number(10**12)) + b"\x81", "calls torch.storage.UntypedStorage"),
    "a call within a call": (
        called(
            name("torch._tensor", "_rebuild_from_type_v2"), name("torch", "FloatTensor"), name("torch", "Tensor"), many(number(9)), b"}"
        ),
        r"calls torch\.FloatTensor\(int\)",
    ),
    "a number in digits": (called(name("builtins", "complex"), text("1" * 10**5)), r"calls builtins\.complex\(str\)"),
    "a copy of a repeated tensor": (
        called(rebuild("device_tensor_from_cpu_tensor"), REPEATED, name("torch", "float64"), text("cpu"), b"\x89"),
        "calls torch._utils._rebuild_device_tensor_from_cpu_tensor",
    ),
    "values by a state": (
        called(rebuild("parameter_with_state"), WHOLE, b"\x89", called(ODICT), mapping(text("data"), REPEATED)),
        "calls torch._utils._rebuild_parameter_with_state",
    ),
    "a method by a state": (called(ODICT) + mapping(text("items"), ODICT) + b"b", "sets the state of a OrderedDict"),
    "another's state": (WHOLE + many(stored(), number(0), many(), many()) + b"b", "sets the state of a Tensor"),
    "a tensor without values": (
        called(rebuild("wrapper_subclass"), name("torch", "Tensor"), name("torch", "float32"), many(number(4)), many(number(1)))[:-2]
        + number(0)
        + called(name("torch.serialization", "_get_layout"), text("torch.strided"))
        + text("cpu")
        + b"\x89tR",
        "calls torch._utils._rebuild_wrapper_subclass",
    ),
    "more values than stored": (tensor((10**6,), (1,), storage=stored(numel=10**6)), "record size"),
    "places behind the end": (tensor((4,), (2,)), "not resizable"),
    "places before the start": (tensor((4,), (1,), -4), "invalid storage offset"),
    "steps backwards": (tensor((4,), (-1,), 3), "overflowed|negative"),
    "a negative size": (tensor((-4,), (1,)), "overflow|negative"),
    "sizes whose product overflows": (tensor((2**62, 2**62), (0, 0)), "overflow"),
    "a sparse index out of range": (sparse(1), "found index 9"),
    "repeated sparse values": (sparse(1, (2**33,), (0,)), "calls torch._utils._rebuild_sparse_tensor"),
    "nested places out of range": (nested(3), "calls torch._utils._rebuild_nested_tensor"),
    "deep lists": (b"]" * 10**5 + b"a" * (10**5 - 1), "nested in more than 100 levels"),
    "lists as deep as Python's calls": (b"]" * 900 + b"a" * 899, "nested in more than 100 levels"),
    "deep tuples as a value": (mapping(text("x"), DEEP), "nested in more than 100 levels"),
    "an instruction that torch has not": (b"N0N", "Unsupported operand 48"),
}
RECORDS = {"data/0": bytes(16), "data/1": struct.pack("<2q", 0, 9), "data/2": struct.pack("<4q", 1, 1, 1, 9)}


def write(path: Path, program: bytes) -> None:
    """Write a checkpoint around a pickle: 16 bytes of zeros, and some integers."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\2" + program + b".")
        for record, data in {"byteorder": b"little", "version": b"3\n", **RECORDS}.items():
            archive.writestr(f"archive/{record}", data)
