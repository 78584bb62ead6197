"""Which tensors a write into one of them would change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.utils.shared_memory import SharedMemory

WHOLE = torch.zeros(6, 4)
META = torch.empty(2, device="meta")
TENSORS: dict[str, Tensor] = {
    "whole": WHOLE,
    "rows 0-1": WHOLE[:2],
    "rows 2-5": WHOLE[2:],
    "left": WHOLE[:, :2],
    "right": WHOLE[:, 2:],
    "transposed": nn.Parameter(WHOLE.t()),
    "bits": WHOLE.view(torch.int16)[:1],
    "same data": nn.Parameter(WHOLE[3:4].data),
    "empty": WHOLE[:0],
    "alone": torch.zeros(6, 4),
    "meta": META,
    "meta view": META[:1],
    "sparse": torch.eye(2).to_sparse(),
}


@pytest.mark.parametrize("name", TENSORS)
def test_they_are_those_that_a_write_changes(name: str) -> None:
    found = SharedMemory(TENSORS.items()).names(TENSORS[name])
    mine = TENSORS[name]
    if mine.is_meta or mine.is_sparse or not mine.numel():
        assert found == [name]
        return
    before = {other: tensor.detach().to_dense().clone() for other, tensor in TENSORS.items() if not tensor.is_meta}
    with torch.no_grad():
        mine.fill_(7)
    changed = [other for other, values in before.items() if not torch.equal(values, TENSORS[other].detach().to_dense())]
    with torch.no_grad():
        mine.zero_()
    assert found == changed and name in found


def test_parameters_without_a_shape_are_themselves_only() -> None:
    lazy = list(nn.LazyLinear(2).named_parameters())
    assert [SharedMemory(lazy).names(parameter) for _, parameter in lazy] == [["weight"], ["bias"]]


def test_one_tensor_under_two_names_has_both() -> None:
    (sparse,) = [tensor for name, tensor in TENSORS.items() if name == "sparse"]
    assert SharedMemory([("a", sparse), ("b", META), ("c", sparse)]).names(sparse) == ["a", "c"]
