"""Grouped products with low-rank updates as one operation: outputs and gradients against each group's dense matrix in float64."""

import pytest
import torch
import torch.nn.functional as F

from lightning_lora.ops import backends
from lightning_lora.ops.grouped_linear import grouped_lora_linear, one_operation_takes
from tests.ops import operands as given
from tests.ops.operands import DEVICE, DTYPES, TOLERANCE, error

ENDS, IN, OUT, SCALE = [4, 4, 9, 16], 16, 24, 0.7  # where the groups' rows end; the second group has none
GROUPS, ROWS = len(ENDS), ENDS[-1]
BOUND = 3 * TOLERANCE[DTYPES[0]]  # three products, one after another
backends.look_at(torch.device(DEVICE, 0))


def tensor(*shape):
    return given.tensor(*shape, dtype=DTYPES[0])


def operands(rank):
    """x, W, A, B and the gradient of y."""
    return tensor(ROWS, IN), tensor(GROUPS, OUT, IN), tensor(GROUPS, rank, IN), tensor(GROUPS, OUT, rank), tensor(ROWS, OUT)


def definition(x, W, A, B, dropped=None):
    parts, start = [], 0
    for g, end in enumerate(ENDS):
        read = (x if dropped is None else dropped)[start:end]
        parts.append(x[start:end] @ W[g].T + SCALE * read @ A[g].T @ B[g].T)
        start = end
    return torch.cat(parts)


def run(x, W, A, B, dropout=0.0):
    return grouped_lora_linear(x, W.mT, A, B, torch.tensor(ENDS, dtype=torch.int32, device=DEVICE), SCALE, dropout)


@pytest.mark.parametrize("rank", [1, 3, 4, 9])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_outputs_and_gradients(rank, dropout):
    x, W, A, B, dy = operands(rank)
    trained = [t.requires_grad_() for t in (x, A, B)]
    exact = [t.detach().double().requires_grad_() for t in trained]
    torch.manual_seed(2)
    y = run(x, W, A, B, dropout)
    torch.manual_seed(2)
    mask = F.dropout(torch.ones_like(x), dropout).double() if dropout else None
    wanted = definition(exact[0], W.double(), exact[1], exact[2], None if mask is None else exact[0] * mask)
    assert error(y, wanted) < BOUND
    mine, theirs = torch.autograd.grad(y, trained, dy), torch.autograd.grad(wanted, exact, dy.double())
    assert all(error(a, b) < BOUND for a, b in zip(mine, theirs, strict=True))
    assert all(g.any() for g in mine) and not mine[1][1].any() and not mine[2][1].any()


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    x, W, A, B, dy = operands(4)
    whole = [t.clone().requires_grad_() for t in (x, A, B)]
    run(whole[0], W, *whole[1:]).backward(dy)
    some = [t.clone().requires_grad_(k != frozen) for k, t in enumerate((x, A, B))]
    run(some[0], W, *some[1:]).backward(dy)
    for k, (mine, theirs) in enumerate(zip(some, whole, strict=True)):
        assert mine.grad is None if k == frozen else torch.equal(mine.grad, theirs.grad)


def test_only_x_and_the_rank_r_product_are_kept_beside_weights():
    x, W, A, B, _ = operands(8)
    kept, weights = [], {t.untyped_storage().data_ptr() for t in (W, A, B)}

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(x, W, A.requires_grad_(), B.requires_grad_())
    others = [tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in weights]
    assert sorted(others) == [(GROUPS,), (ROWS, 8), (ROWS, IN)]


def test_products_do_not_grow_with_the_groups():
    """Two forward and four backward: one for each factor and the weight, whatever the number of groups."""
    x, W, A, B, dy = operands(4)
    with torch.profiler.profile() as profiler:
        run(x.requires_grad_(), W, A.requires_grad_(), B.requires_grad_()).backward(dy)
    # Without kernels the two updates are added from products of their own.
    assert sum(event.name == "aten::_grouped_mm" for event in profiler.events()) == (8 if DEVICE == "cpu" else 6)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_second_derivatives(dropout):
    x, W, A, B, dy = operands(4)
    trained, exact = [t.requires_grad_() for t in (x, A, B)], [t.detach().double().requires_grad_() for t in (x, A, B)]
    torch.manual_seed(2)
    y = run(x, W, A, B, dropout)
    torch.manual_seed(2)
    mask = F.dropout(torch.ones_like(x), dropout).double() if dropout else 1.0
    wanted = definition(exact[0], W.double(), *exact[1:], exact[0] * mask)

    def twice(y, inputs, dy):
        first = torch.autograd.grad(y, inputs, dy, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), inputs)

    mine, theirs = twice(y, trained, dy), twice(wanted, exact, dy.double())
    assert all(error(a, b) < 4 * BOUND for a, b in zip(mine, theirs, strict=True))


def test_a_gradient_that_a_sum_expanded():
    x, W, A, B, _ = operands(4)
    A.requires_grad_()
    run(x, W, A, B).sum().backward()
    wanted = A.detach().clone().requires_grad_()
    run(x, W, wanted, B).backward(torch.ones_like(run(x, W, wanted, B)))
    assert torch.equal(A.grad, wanted.grad)


def test_compiled_it_is_one_graph_with_the_same_gradients():
    x, W, A, B, dy = operands(4)
    trained = [t.requires_grad_() for t in (x, A, B)]
    plain = torch.autograd.grad(run(x, W, A, B), trained, dy)
    try:
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        found = torch.autograd.grad(compiled(x, W, A, B), trained, dy)
    finally:
        torch.compiler.reset()
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_what_it_does_not_take():
    x, W, *_ = operands(4)
    assert one_operation_takes(x, W) and not one_operation_takes(x.double(), W)
    assert not one_operation_takes(x, W.requires_grad_())
