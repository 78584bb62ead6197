"""No file makes its reader hang, crash or fill the memory; and whatever torch.save writes comes back as torch reads it."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora.storage.bounded_pickle import BoundedUnpickler
from lightning_lora.storage.read_checkpoint import read_checkpoint, readable
from lightning_lora.utils.torch_private import WeightsOnlyUnpickler
from tests.memory import peak
from tests.storage.hostile import PICKLES, write


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_pickle_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    program, said = PICKLES[name]
    write(tmp_path / "x.ckpt", program)
    peak()
    before = peak()
    with pytest.raises(ValueError, match=rf"^\S*x\.ckpt is not a readable checkpoint: .*({said})") as caught:
        read_checkpoint(tmp_path / "x.ckpt")
    assert "\n" not in str(caught.value) and peak() - before < 64 * 2**20


def attributed(value: Any, **attributes: Any) -> Any:
    for name, attribute in attributes.items():
        setattr(value, name, attribute)
    return value


VALUES: dict[str, Callable[[], Any]] = {
    "plain values": lambda: [None, True, 1.5, 10**50, "ä" * 300, "", "R", b"\0\xff" * 50, bytearray(b"12"), 1 + 2j, (), ((1, (2,)),)],
    "containers": lambda: [Counter("aab"), OrderedDict(a=1), {1, (2, "x")}, set(range(5000)), torch.Size([1, 2])],
    "a state dict": lambda: attributed(nn.Linear(2, 2).state_dict(), note={"x": 1}),
    "keys": lambda: {(1, ("a", 2)): 1, 2**100: 2, 1.5: 3, None: 4, True: 5, **{(i, "x"): i for i in range(3000)}},
    "names": lambda: [torch.float32, torch.device("cuda", 0), torch.strided, torch.Tensor, set, OrderedDict, nn.Parameter],
    "tensors": lambda: [torch.ones(2, dtype=dtype) for dtype in (torch.bool, torch.uint16, torch.bfloat16, torch.complex64)],
    "views": lambda: [torch.ones(1).expand(9), torch.arange(9.0)[2::3], torch.zeros(0, 3), torch.ones(2, dtype=torch.complex64).conj()],
    "layouts": lambda: [torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), torch.sparse_coo_tensor(size=(3, 3))],
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)]),
    "without values": lambda: torch.ones(2, device="meta"),
    "parameters": lambda: [nn.Parameter(torch.ones(2)), attributed(nn.Parameter(torch.ones(2)), tag=[1]), nn.Buffer(torch.ones(2))],
    "attributes": lambda: attributed(torch.ones(2), tag={"x": 1}),
    "storages": lambda: torch.ones(3).untyped_storage(),
    "eight bits": lambda: torch.ones(2).to(torch.float8_e4m3fn),
}


OLD = [name for name in VALUES if name not in ("tensors", "nested", "storages", "eight bits")]  # torch reads these from archives alone


@pytest.mark.parametrize(("name", "zipped"), [*((name, True) for name in VALUES), *((name, False) for name in OLD)])
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path: Path, name: str, zipped: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layouts in beta state
        torch.save({"x": VALUES[name]()}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
        plain, read = torch.load(tmp_path / "x.ckpt", weights_only=True), read_checkpoint(tmp_path / "x.ckpt")
        assert repr(read) == repr(plain) and [type(value) for value in read.values()] == [type(value) for value in plain.values()]


def test_quantized_tensors(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, says torch
        content = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8)
        torch.save(content, tmp_path / "x.ckpt")
        assert torch.equal(read_checkpoint(tmp_path / "x.ckpt").dequantize(), content.dequantize())


class Trusted:
    """A class of the user's, with arguments and a state that nothing here knows."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __reduce__(self) -> tuple[Any, ...]:
        return Trusted, (list(range(2000)), {"a": 1}), {"more": [2]}


def test_what_the_user_trusts_is_called_with_anything(tmp_path: Path) -> None:
    torch.save({"x": Trusted()}, tmp_path / "x.ckpt")
    with torch.serialization.safe_globals([Trusted]):
        read = read_checkpoint(tmp_path / "x.ckpt")["x"]
    assert read.values == (list(range(2000)), {"a": 1}) and read.more == [2]


def test_others_read_as_before_and_threads_together() -> None:
    def installed() -> type:
        return torch._weights_only_unpickler.Unpickler

    both, after = Barrier(2, timeout=20), []

    def read(first: bool) -> None:
        with contextlib.ExitStack() as until:
            until.enter_context(readable("x"))
            both.wait()
            if first:
                until.close()
            both.wait()
            if not first:
                after.append(installed())

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(read, (True, False)))
    assert after == [BoundedUnpickler], "one that is done leaves the bounds to the other"
    assert installed() is WeightsOnlyUnpickler and not torch.sparse.check_sparse_tensor_invariants.is_enabled()
