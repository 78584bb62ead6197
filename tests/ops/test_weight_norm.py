"""The norms of a weight with its update against the dense product in float64, as torch and as the kernel have them."""

import pytest
import torch

from lightning_lora.ops import weight_norm
from lightning_lora.ops.weight_norm import squared_norms
from tests.ops.operands import DEVICE


def operands(out=40, features=300, rank=5):
    made = torch.randn(out, features), torch.randn(rank, features) * 0.3, torch.randn(out, rank) * 0.3
    return tuple(tensor.to(DEVICE) for tensor in made)


def dense(W, A, B, scale):
    return (W.double() + scale * B.double() @ A.double()).square().sum(-1)


@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("start", [False, True])
def test_equals_the_dense_product(start, served, monkeypatch):
    if served:
        pytest.importorskip("triton")
        monkeypatch.setattr(weight_norm, "_kernel_takes", lambda W: True)
    W, A, B = operands()
    B *= not start
    found = squared_norms(W, A, B, 1.5)
    torch.testing.assert_close(found.double(), dense(W, A, B, 1.5), rtol=2e-6, atol=0)
    assert found.dtype == torch.float32


def test_groups():
    W, A, B = torch.randn(2, 6, 9), torch.randn(2, 3, 9), torch.randn(2, 6, 3)
    found = squared_norms(W, A, B, 0.5)
    torch.testing.assert_close(found.double(), dense(W, A, B, 0.5).flatten(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("left", [1.0, 0.3, 1e-2, 1e-4])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("groups", [False, True])
def test_an_update_that_takes_the_weight_away(left, compiled, groups):
    """Expanded, ‖W + s·B·A‖² is then a small difference of large numbers."""
    A, B = torch.randn(2, 4, 90), torch.randn(2, 30, 4)
    W = -1.5 * (B @ A) + left * torch.randn(2, 30, 90)
    W[:, ::3] = torch.randn(2, 10, 90)  # rows of the usual kind between
    W, A, B = (W, A, B) if groups else (W[0], A[0], B[0])
    call = torch.compile(squared_norms, backend="eager", fullgraph=True) if compiled else squared_norms
    found = call(W, A, B, 1.5)
    exact = dense(W, A, B, 1.5).flatten()
    # Rounding W + s·B·A in its entries is left: relative to the norm that is eps·‖W‖/‖W + s·B·A‖.
    assert ((found.double() - exact).abs() / exact).max() < 3e-6 + 6e-7 / left


def test_a_cpu_has_no_kernel_for_it():
    assert not weight_norm._kernel_takes(torch.ones(4, 4, dtype=torch.bfloat16))


def test_compiled_it_is_one_operation(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(weight_norm, "_kernel_takes", lambda W: True)
    torch._dynamo.reset()
    operations = []

    def backend(graph, inputs):
        operations.extend(node.target for node in graph.graph.nodes if "squared_norms" in str(node.target))
        return graph

    compiled = torch.compile(lambda W, A, B: squared_norms(W, A, B, 0.5), backend=backend, fullgraph=True)
    W, A, B = operands()
    torch.testing.assert_close(compiled(W, A, B), squared_norms(W, A, B, 0.5))
    assert len(operations) == 1
    (real,), (told,) = torch.ops.lightning_lora.squared_norms(W, A, B, 0.5), weight_norm._squares_shapes(W, A, B, 0.5)
    assert (real.shape, real.dtype, real.stride()) == (told.shape, told.dtype, told.stride())
