"""The kernel for the norms against the dense product in float64."""

import pytest

pytest.importorskip("triton")

from lightning_lora.ops import triton_weight_norm
from tests.ops.operands import DTYPES, TOLERANCE, error, strided, tensor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [tensor, strided])
@pytest.mark.parametrize(("rows", "cols", "rank"), [(70, 48, 5), (33, 300, 40), (17, 136, 100)])
def test_equals_the_dense_product(rows, cols, rank, make, dtype):
    W, A, B = make(rows, cols, dtype=dtype), tensor(rank, cols) * 0.2, tensor(rank, rows).t() * 0.2
    exact = (W.double() + 1.5 * B.double() @ A.double()).square().sum(1)
    assert error(triton_weight_norm.squares(W, A, B, 1.5).sum(0), exact) < TOLERANCE[dtype]


def test_without_an_update_they_are_the_weights_own():
    W, A = tensor(20, 300), tensor(4, 300)
    found = triton_weight_norm.squares(W, A, tensor(20, 4) * 0, 2.0)
    assert found.shape == (triton_weight_norm.parts(300), 20)
    assert error(found.sum(0), W.double().square().sum(1)) < 1e-6
