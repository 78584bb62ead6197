"""NaN and infinity are found whatever the dtype, in one look."""

from __future__ import annotations

import pytest
import torch

from lightning_lora.utils.values import kind_of_numbers, nonfinite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_spoilt_are_named(dtype: torch.dtype, value: float) -> None:
    for size in (1, 3, 33, 4097):
        tensors = {f"{i}": torch.randn(size).to(dtype) for i in range(5)} | {"empty": torch.empty(0, dtype=dtype)}
        assert nonfinite(tensors) == []
        for name, where in (("3", 0), ("1", size - 1)):
            tensors[name][where] = value
        assert nonfinite(tensors) == ["1", "3"]


def test_large_numbers_are_fine_and_others_are_not_looked_at() -> None:
    large = {f"{dtype}": torch.full((9,), torch.finfo(dtype).max, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    whole = {"ids": torch.arange(3), "mask": torch.ones(2, dtype=torch.bool), "scalar": torch.tensor(2.0)}
    assert nonfinite(large | whole | {"grad": torch.nn.Parameter(torch.ones(2))}) == []
    assert nonfinite({}) == []


def test_kinds_of_numbers() -> None:
    kinds = {torch.float16: "floating-point", torch.int8: "integer", torch.uint8: "integer", torch.bool: "boolean", torch.cfloat: "complex"}
    assert {dtype: kind_of_numbers(dtype) for dtype in kinds} == kinds
