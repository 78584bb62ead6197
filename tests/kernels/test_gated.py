"""The gated MLP's kernels against autograd of the definition in float64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from lightning_lora.kernels import gated, plain
from tests.kernels.operands import DTYPES, TOLERANCE, error, tensor
from tests.kernels.test_low_rank import drop_of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "cols", "ranks"), [(70, 96, (4, 4, 4)), (130, 552, (16, 16, 16)), (33, 72, (3, 20, 8))])
def test_forward_and_backward(rows, cols, ranks, p, dtype):
    rg, ru, rd = ranks
    g, u, dh = (tensor(rows, cols, dtype=dtype, seed=k) for k in range(3))
    t, dtd = tensor(rows, rg + ru + 5, dtype=dtype)[:, : rg + ru], tensor(rows, rd, dtype=dtype)
    Bg, Bu, Ad = tensor(cols, rg, dtype=dtype), tensor(cols, ru, dtype=dtype), tensor(rd, cols, dtype=dtype)
    drop, mask = drop_of(g, p)[:2] if p else (None, None)

    leaves = [z.detach().double().requires_grad_() for z in (g, u, t, Bg, Bu, Ad)]
    g64, u64, t64, Bg64, Bu64, Ad64 = leaves
    h64 = F.silu(g64 + t64[:, :rg] @ Bg64.t()) * (u64 + t64[:, rg:] @ Bu64.t())
    td64 = plain.project(h64, Ad64, mask, 3.0)
    *first, dt64, dBg64, dBu64, dAd64 = torch.autograd.grad([h64, td64], leaves, [dh.double(), dtd.double() / 3])

    exact = (*first, dt64 * 0.5, dBg64, dBu64, dAd64)

    h, td = gated.forward(g, u, t, Bg, Bu, Ad, drop, 3.0)
    grads = gated.backward(dh.clone(), g, u, t, Bg, Bu, Ad, dtd, drop, 0.5)
    assert error(h, h64.detach()) < TOLERANCE[dtype]
    assert error(td, td64.detach()) < TOLERANCE[dtype] * 2
    for name, mine, truth in zip(("dg", "du", "dt", "dBg", "dBu", "dAd"), grads, exact, strict=True):
        assert error(mine, truth) < TOLERANCE[dtype] * 2, name


def test_the_inputs_are_left_alone():
    g, u, t, dtd = tensor(20, 40), tensor(20, 40, seed=1), tensor(20, 8), tensor(20, 4)
    Bg, Bu, Ad = tensor(40, 4), tensor(40, 4, seed=1), tensor(4, 40)
    before = [z.clone() for z in (g, u, t, Bg, Bu, Ad, dtd)]
    gated.forward(g, u, t, Bg, Bu, Ad, None)
    gated.backward(tensor(20, 40, seed=2), g, u, t, Bg, Bu, Ad, dtd, None)
    assert all(torch.equal(a, b) for a, b in zip(before, (g, u, t, Bg, Bu, Ad, dtd), strict=True))
