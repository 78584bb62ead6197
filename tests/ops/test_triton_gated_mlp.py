"""The gated MLP's kernels against autograd of the definition in float64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from lightning_lora.ops import plain, triton_gated_mlp
from tests.ops.operands import DTYPES, TOLERANCE, error, tensor
from tests.ops.test_triton_low_rank import drop_of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("rows", "cols", "ranks", "scaled"),
    [
        *[(70, 96, (4, 4, 4), False), (130, 552, (16, 16, 16), False), (33, 72, (3, 20, 8), False), (70, 72, (3, 5, 8), True)],
        *[(70, 96, (64, 40, 33), False), (33, 72, (33, 64, 8), True)],  # the sums are products that follow
        *[(70, 96, (128, 65, 8), False), (20, 264, (256, 256, 256), False), (33, 72, (4, 80, 96), True)],  # the updates are products too
    ],
)
def test_forward_and_backward(rows, cols, ranks, scaled, p, dtype):
    rg, ru, rd = ranks
    g, u, dh = (tensor(rows, cols, dtype=dtype, seed=k) for k in range(3))
    t, dtd = tensor(rows, rg + ru + 5, dtype=dtype)[:, : rg + ru], tensor(rows, rd, dtype=dtype)
    Bg, Bu, Ad = tensor(cols, rg, dtype=dtype), tensor(cols, ru, dtype=dtype), tensor(rd, cols, dtype=dtype)
    drop, mask = drop_of(g, p)[:2] if p else (None, None)

    out_scales = [tensor(cols, seed=k) for k in range(2)] if scaled else []

    leaves = [z.detach().double().requires_grad_() for z in (g, u, t, Bg, Bu, Ad, *out_scales)]
    g64, u64, t64, Bg64, Bu64, Ad64, *scales64 = leaves
    gate, up = scales64 or (1.0, 1.0)
    h64 = F.silu(gate * (g64 + t64[:, :rg] @ Bg64.t())) * (up * (u64 + t64[:, rg:] @ Bu64.t()))
    td64 = plain.project(h64, Ad64, mask, 3.0)
    dg64, du64, dt64, *rest = torch.autograd.grad([h64, td64], leaves, [dh.double(), dtd.double() / 3])

    exact = (dg64, du64, dt64 * 0.5, *rest)

    g, u = g.clone(), u.clone()  # which wide ranks write to
    h, td = triton_gated_mlp.forward(g, u, t, Bg, Bu, Ad, drop, 3.0, out_scales)
    grads = triton_gated_mlp.backward(dh.clone(), g, u, t, Bg, Bu, Ad, dtd, drop, 0.5, out_scales)
    assert error(h, h64.detach()) < TOLERANCE[dtype]
    assert error(td, td64.detach()) < TOLERANCE[dtype] * 2
    names = ("dg", "du", "dt", "dBg", "dBu", "dAd", "dgg", "dgu")
    for name, mine, truth in zip(names[: len(exact)], grads, exact, strict=True):
        assert error(mine, truth) < TOLERANCE[dtype] * 2, name


def test_the_inputs_are_left_alone():
    g, u, t, dtd = tensor(20, 40), tensor(20, 40, seed=1), tensor(20, 8), tensor(20, 4)
    Bg, Bu, Ad = tensor(40, 4), tensor(40, 4, seed=1), tensor(4, 40)
    before = [z.clone() for z in (g, u, t, Bg, Bu, Ad, dtd)]
    triton_gated_mlp.forward(g, u, t, Bg, Bu, Ad, None)
    triton_gated_mlp.backward(tensor(20, 40, seed=2), g, u, t, Bg, Bu, Ad, dtd, None)
    assert all(torch.equal(a, b) for a, b in zip(before, (g, u, t, Bg, Bu, Ad, dtd), strict=True))
