"""A gated MLP as one operation against its definition, the kernels under Triton's interpreter (or on the GPU that is there)."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from lightning_lora.ops import gated_mlp, triton_low_rank
from tests.ops.operands import error, tensor

ROWS, IN, WIDE, OUT, RANKS, SCALES = 20, 16, 24, 12, (4, 3, 5), (0.5, 2.0, 1.5)


def operands(ranks=RANKS):
    sizes = ((WIDE, IN), (WIDE, IN), (OUT, WIDE))
    Ws = [tensor(*size, seed=k) * 0.3 for k, size in enumerate(sizes)]
    A_list = [(tensor(r, size[1], seed=k) * 0.3).requires_grad_() for k, (r, size) in enumerate(zip(ranks, sizes, strict=True))]
    B_list = [(tensor(size[0], r, seed=k) * 0.6 / r**0.5).requires_grad_() for k, (r, size) in enumerate(zip(ranks, sizes, strict=True))]
    return tensor(ROWS, IN).requires_grad_(), Ws, A_list, B_list


def scales_of(B_list):
    return [(tensor(B.shape[0], seed=k) * 0.3 + 1).requires_grad_() for k, B in enumerate(B_list)]


def definition(x, Ws, A_list, B_list, keep=1.0, keep_down=1.0, out_scales=()):
    def project(z, k, mask):
        y = F.linear(z, Ws[k].to(z)) + F.linear(F.linear(z * mask, A_list[k].to(z)), B_list[k].to(z)) * SCALES[k]
        return y * out_scales[k].to(z) if out_scales else y

    return project(F.silu(project(x, 0, keep)) * project(x, 1, keep), 2, keep_down)


@pytest.mark.parametrize("ranks", [RANKS, (64, 33, 5), (80, 65, 96)], ids=str)
@pytest.mark.parametrize(("batched", "scaled"), [(False, False), (True, False), (True, True)])
def test_equals_the_definition_with_every_gradient(batched, scaled, ranks):
    x, Ws, A_list, B_list = operands(ranks)
    out_scales = scales_of(B_list) if scaled else []
    given, leaves = x.view(4, 5, IN) if batched else x, [x, *A_list, *B_list, *out_scales]
    mine, exact = (
        gated_mlp.lora_gated_mlp(given, Ws, A_list, B_list, SCALES, 0.0, out_scales),
        definition(given.double(), Ws, A_list, B_list, out_scales=out_scales),
    )
    assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(mine.square().sum(), leaves)
    for gradient, wanted in zip(found, torch.autograd.grad(exact.square().sum(), leaves), strict=True):
        assert_close(gradient, wanted, rtol=1e-3, atol=max(1e-4, 1e-5 * wanted.abs().max().item()))  # sums of the largest terms' rounding


def test_a_backward_pass_under_autocast_is_in_the_dtype_of_the_forward_pass():
    x, Ws, A_list, B_list = operands()
    mine = gated_mlp.lora_gated_mlp(x, Ws, A_list, B_list, SCALES).square().sum()
    expected = torch.autograd.grad(mine, [x, *A_list, *B_list], retain_graph=True)
    with torch.autocast(x.device.type, torch.bfloat16):
        found = torch.autograd.grad(mine, [x, *A_list, *B_list])
    assert_close(found, expected)


@pytest.mark.parametrize(("scaled", "ranks"), [(False, RANKS), (True, RANKS), (False, (40, 3, 5)), (False, (70, 65, 96))])
def test_dropout_and_second_derivatives(scaled, ranks):
    x, Ws, A_list, B_list = operands(ranks)
    out_scales = scales_of(B_list) if scaled else []
    leaves = [x, *A_list, *B_list, *out_scales]
    torch.manual_seed(2)
    mine = gated_mlp.lora_gated_mlp(x, Ws, A_list, B_list, SCALES, 0.5, out_scales)
    torch.manual_seed(2)
    masks = []
    for size in (IN, WIDE):  # drawn in this order
        drop, _ = triton_low_rank.draw_drop(x, 0.5)
        masks.append(triton_low_rank.project(torch.ones(ROWS, size, device=x.device), torch.eye(size, device=x.device), drop) * 2)
    exact = definition(x.double(), Ws, A_list, B_list, *masks, out_scales)
    assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5)
    first = torch.autograd.grad(mine.square().sum(), leaves, create_graph=True)
    defined = torch.autograd.grad(exact.square().sum(), leaves, create_graph=True)
    assert max(error(mine, exact) for mine, exact in zip(first, defined, strict=True)) < 1e-4
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    assert_close(second, torch.autograd.grad(sum(g.square().sum() for g in defined), leaves), rtol=1e-2, atol=1e-2)


def test_only_adapters_train_when_x_does_not():
    x, Ws, A_list, B_list = operands()
    x = x.detach()
    found = torch.autograd.grad(gated_mlp.lora_gated_mlp(x, Ws, A_list, B_list, SCALES).sum(), [*A_list, *B_list])
    exact = torch.autograd.grad(definition(x.double(), Ws, A_list, B_list).sum(), [*A_list, *B_list])
    assert_close(found, exact, rtol=1e-3, atol=1e-4)


def test_factors_that_lie_transposed():
    x, Ws, A_list, B_list = operands()
    expected = gated_mlp.lora_gated_mlp(x, Ws, A_list, B_list, SCALES)
    A_list, B_list = ([p.detach().t().contiguous().t() for p in factors] for factors in (A_list, B_list))
    assert_close(gated_mlp.lora_gated_mlp(x, Ws, A_list, B_list, SCALES), expected)


@pytest.mark.parametrize("ranks", [RANKS, (70, 65, 5)], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_operations_say_their_shapes_right(scaled, ranks):
    x, Ws, A_list, B_list = operands(ranks)
    out_scales = [out_scale.detach() for out_scale in scales_of(B_list)] if scaled else []
    x, A_list, B_list = x.detach(), [A.detach() for A in A_list], [B.detach() for B in B_list]
    forward = (x, None, None, 0, list(SCALES), Ws, [""] * 3, A_list, B_list, out_scales)
    h, g, u, t, t_down, *copies = gated_mlp._inner(*forward)
    outer = (h, t_down, Ws, [""] * 3, copies[3] if copies else B_list[2], out_scales)
    y, *z_down = gated_mlp._outer(*outer)
    assert len(copies) == (5 if ranks == RANKS else 0)
    settings = (None, None, 0, list(SCALES), Ws, [""] * 3)
    backward = (torch.randn_like(y), x, g, u, t, t_down, z_down[0] if scaled else None, *settings, A_list, B_list, out_scales, copies, True)
    for operation, shapes, given in (
        (torch.ops.lightning_lora.gated_mlp_inner, gated_mlp._inner_shapes, forward),
        (torch.ops.lightning_lora.gated_mlp_outer, gated_mlp._outer_shapes, outer),
        (torch.ops.lightning_lora.gated_mlp_backward, gated_mlp._backward_shapes, backward),
    ):
        real, told = operation(*given), shapes(*given)
        assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in told]


def test_a_compiled_checkpoint_does_not_compute_the_last_product_again(traced):
    """Nothing in the backward pass needs what down returns; gate's and up's products it does."""
    x, Ws, A_list, B_list = operands()
    leaves = [x, *A_list, *B_list]

    def block(x):
        return x[:, :OUT] + checkpoint(lambda x: gated_mlp.lora_gated_mlp(x, Ws, A_list, B_list, SCALES), x, use_reentrant=False)

    compiled, graphs = traced(block)
    found = torch.autograd.grad(compiled(x).square().sum(), leaves)
    names = [[str(node.target).split(".")[1] for node in graph.graph.nodes if "lightning_lora" in str(node.target)] for graph in graphs]
    assert names == [["gated_mlp_inner", "gated_mlp_outer"], ["gated_mlp_inner", "gated_mlp_backward"]]
    assert_close(found, torch.autograd.grad(block(x).square().sum(), leaves))
