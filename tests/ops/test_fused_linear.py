"""`lora_linears` against the definition, layer by layer: values, gradients, dropout, dtypes, what it keeps, compilers."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from lightning_lora.ops import factor_copies, fused_linear, plain
from lightning_lora.ops.fused_linear import lora_linears
from tests.ops.operands import DEVICE

IN, OUTS, RANKS, SCALES = 5, (4, 6, 3), (3, 2, 4), (0.7, 2.0, 0.7)


def operands(n=3, batch=(2, 3), bias=True, dtype=torch.float64):
    """x, and for each sibling W, bias, A, B; only x, A and B require a gradient."""
    torch.manual_seed(0)
    x = torch.randn(*batch, IN, dtype=dtype, requires_grad=True)
    Ws = [torch.randn(out, IN, dtype=dtype) for out in OUTS[:n]]
    biases = [torch.randn(out, dtype=dtype) if bias else None for out in OUTS[:n]]
    A_list = [torch.randn(r, IN, dtype=dtype, requires_grad=True) for r in RANKS[:n]]
    B_list = [torch.randn(out, r, dtype=dtype, requires_grad=True) for out, r in zip(OUTS, RANKS, strict=True)][:n]
    return x, Ws, biases, A_list, B_list


def definition(x, Ws, biases, A_list, B_list, scales, keep=None):
    dropped = x if keep is None else x * keep
    return tuple(
        F.linear(x, W, b) + F.linear(F.linear(dropped, A), B) * s for W, b, A, B, s in zip(Ws, biases, A_list, B_list, scales, strict=True)
    )


def with_scales(n=3, batch=(2, 3), bias=True):
    """Operands, and a scale for each sibling but the second, whose output is the sum itself."""
    given = operands(n, batch, bias)
    return *given, [torch.randn(B.shape[0], dtype=torch.float64, requires_grad=True) if k != 1 else None for k, B in enumerate(given[4])]


def scaled_sum(x, Ws, biases, A_list, B_list, scales, out_scales, keep=None):
    """The definition with scales."""
    sums = definition(x, Ws, [None] * len(Ws), A_list, B_list, scales, keep)
    scaled = [y if out_scale is None else y * out_scale for y, out_scale in zip(sums, out_scales, strict=True)]
    return tuple(y if b is None else y + b for y, b in zip(scaled, biases, strict=True))


def gradients(outputs, leaves):
    torch.manual_seed(1)
    return torch.autograd.grad(sum((y * torch.randn_like(y)).sum() for y in outputs), leaves)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (6,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_equals_the_definition_with_every_gradient(n, batch, bias):
    x, Ws, biases, A_list, B_list = operands(n, batch, bias)
    mine, defined = lora_linears(x, Ws, biases, A_list, B_list, SCALES[:n]), definition(x, Ws, biases, A_list, B_list, SCALES[:n])
    assert_close(mine, defined)
    assert_close(gradients(mine, [x, *A_list, *B_list]), gradients(defined, [x, *A_list, *B_list]))


def test_dropout_drops_the_same_entries_for_all(monkeypatch):
    x, Ws, biases, A_list, B_list = operands()
    mask = torch.rand(6, IN) < 0.4
    monkeypatch.setattr(plain, "draw_drop", lambda rows, p: (plain.Drop(mask), 0.4))
    mine = lora_linears(x, Ws, biases, A_list, B_list, SCALES, dropout=0.4)
    defined = definition(x, Ws, biases, A_list, B_list, SCALES, (~mask).view(x.shape).to(x.dtype) / 0.6)
    assert_close(mine, defined)
    assert_close(gradients(mine, [x, *A_list, *B_list]), gradients(defined, [x, *A_list, *B_list]))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_first_and_second_derivatives(dropout):
    x, Ws, biases, A_list, B_list = operands(2, (2,))

    def function(x, A1, A2, B1, B2):
        torch.manual_seed(3)
        return lora_linears(x, Ws, biases, [A1, A2], [B1, B2], SCALES[:2], dropout)

    assert gradcheck(function, (x, *A_list, *B_list))
    assert gradgradcheck(function, (x, *A_list, *B_list))


def test_outputs_that_nobody_uses():
    x, Ws, biases, A_list, B_list = operands()
    mine, defined = lora_linears(x, Ws, biases, A_list, B_list, SCALES)[1:2], definition(x, Ws, biases, A_list, B_list, SCALES)[1:2]
    found = torch.autograd.grad(mine[0].sum(), [x, A_list[1], B_list[1], B_list[0]], allow_unused=True)
    assert_close(found[:3], torch.autograd.grad(defined[0].sum(), [x, A_list[1], B_list[1]]))
    assert found[3] is None


def test_biases_can_train():
    x, Ws, biases, A_list, B_list = operands()
    biases[1].requires_grad_()
    mine, defined = lora_linears(x, Ws, biases, A_list, B_list, SCALES), definition(x, Ws, biases, A_list, B_list, SCALES)
    assert_close(gradients(mine, [biases[1]]), gradients(defined, [biases[1]]))


@pytest.fixture(params=["plain", "kernels"])
def backend(request, monkeypatch):
    """Both, the kernels on a GPU or interpreted; and how near to float64 they are."""
    if request.param == "plain":
        return {}
    pytest.importorskip("triton")
    monkeypatch.setattr(fused_linear.backends, "worth_kernels", lambda x: True)
    return {"rtol": 1e-4, "atol": 1e-5}


def near(given, backend):
    """The same operands where the backend is, in its precision."""
    if not backend:
        return given
    low = lambda t: None if t is None else t.detach().to(DEVICE, torch.float32).requires_grad_(t.requires_grad)  # noqa: E731
    return tuple(low(part) if isinstance(part, torch.Tensor) else [low(t) for t in part] for part in given)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_scales_with_every_gradient(n, bias, backend):
    def values(x, Ws, biases, A_list, B_list, out_scales, function):
        outputs = function(x, Ws, biases, A_list, B_list, SCALES[:n], out_scales=out_scales)
        leaves = [t for t in (x, *A_list, *B_list, *out_scales, *biases) if t is not None and t.requires_grad]
        loss = sum((y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)).sum() for y in outputs)
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    given = with_scales(n, bias=bias)
    if bias:
        given[2][0].requires_grad_()
    for mine, exact in zip(values(*near(given, backend), lora_linears), values(*given, scaled_sum), strict=True):
        assert_close(mine.double().cpu(), exact, **backend)


def test_scales_that_are_frozen_keep_no_base_product(backend):
    x, Ws, biases, A_list, B_list, out_scales = near(with_scales(batch=(50,)), backend)
    call = lambda: lora_linears(x, Ws, biases, A_list, B_list, SCALES, 0.0, out_scales)  # noqa: E731
    assert sorted(t.shape[1] for t in saved(call) if t.shape[:1] == (50,)) == [3, 4, IN, sum(RANKS)]
    expected = gradients(call(), [x, *A_list, *B_list])
    out_scales = [None if out_scale is None else out_scale.detach() for out_scale in out_scales]
    assert sorted(t.shape[1] for t in saved(call) if t.shape[:1] == (50,)) == [IN, sum(RANKS)]
    assert_close(gradients(call(), [x, *A_list, *B_list]), expected)


def test_scales_of_outputs_that_nobody_uses(backend):
    x, Ws, biases, A_list, B_list, out_scales = near(with_scales(), backend)
    y = lora_linears(x, Ws, biases, A_list, B_list, SCALES, 0.0, out_scales)[2]
    found = torch.autograd.grad(y.sum(), [x, A_list[2], B_list[2], out_scales[2], out_scales[0]], allow_unused=True)
    exact = scaled_sum(x, Ws, biases, A_list, B_list, SCALES, out_scales)[2]
    assert_close(found[:4], torch.autograd.grad(exact.sum(), [x, A_list[2], B_list[2], out_scales[2]]))
    assert found[4] is None


def test_scales_first_and_second_derivatives():
    x, Ws, biases, A_list, B_list, out_scales = with_scales(1, (2,))
    function = lambda x, A, B, out_scale: lora_linears(x, Ws, biases, [A], [B], SCALES[:1], 0.0, [out_scale])  # noqa: E731
    assert gradcheck(function, (x, *A_list, *B_list, *out_scales))
    assert gradgradcheck(function, (x, *A_list, *B_list, *out_scales))


def test_a_scale_of_one_leaves_the_bits_of_the_base():
    x, Ws, biases, A_list, B_list = operands(dtype=torch.float32)
    B_list, ones = [B.detach() * 0 for B in B_list], [torch.ones(len(B)) for B in B_list]
    for y, W, b in zip(lora_linears(x, Ws, biases, A_list, B_list, SCALES, 0.0, ones), Ws, biases, strict=True):
        assert torch.equal(y, F.linear(x.reshape(-1, IN), W, b).view(y.shape))


def saved(call):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return kept


def test_keeps_x_once_and_the_rank_r_product():
    x, Ws, biases, A_list, B_list = operands(batch=(50,))
    big = [t for t in saved(lambda: lora_linears(x, Ws, biases, A_list, B_list, SCALES)) if t.shape[:1] == (50,)]
    assert sorted(tuple(t.shape) for t in big) == [(50, IN), (50, sum(RANKS))]
    assert any(t.data_ptr() == x.data_ptr() for t in big)


@pytest.mark.parametrize("rank", [64, 65])
def test_copies_of_wide_factors_are_made_again(rank, monkeypatch):
    """fp32 factors under bf16: their copies are kept up to rank 64; above, the rank-r product alone, and the gradients are the same."""
    torch.manual_seed(0)
    x, Ws = torch.randn(50, IN).bfloat16().requires_grad_(), [torch.randn(out, IN).bfloat16() for out in OUTS]
    A_list, B_list = [torch.randn(rank, IN, requires_grad=True) for _ in OUTS], [torch.randn(out, rank, requires_grad=True) for out in OUTS]
    call = lambda: lora_linears(x, Ws, [None] * 3, A_list, B_list, SCALES)  # noqa: E731
    given = {t.data_ptr() for t in (x, *Ws, *A_list, *B_list)}
    kept = sum(t.nbytes for t in saved(call) if t.data_ptr() not in given)
    assert kept == 2 * 50 * 3 * rank + (2 * rank * (3 * IN + sum(OUTS)) if rank == 64 else 0)
    found = gradients(call(), [x, *A_list, *B_list])
    monkeypatch.setattr(factor_copies, "KEPT_RANK", {64: 0, 65: 65}[rank])
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(call(), [x, *A_list, *B_list]), strict=True))


def test_frozen_a_keeps_no_x():
    """LoRA-FA: the point of freezing A."""
    x, Ws, biases, A_list, B_list = operands(batch=(50,))
    frozen = [A.detach() for A in A_list]
    assert [t.shape[1] for t in saved(lambda: lora_linears(x, Ws, biases, frozen, B_list, SCALES)) if t.shape[0] == 50] == [sum(RANKS)]
    mine, defined = lora_linears(x, Ws, biases, frozen, B_list, SCALES), definition(x, Ws, biases, frozen, B_list, SCALES)
    assert_close(gradients(mine, [x, *B_list]), gradients(defined, [x, *B_list]))
    (dx,) = torch.autograd.grad(lora_linears(x, Ws, biases, A_list, B_list, SCALES)[0].square().sum(), x, create_graph=True)
    assert dx.requires_grad
    with pytest.raises(RuntimeError, match=r"second derivatives .* not kept while lora_A is frozen"):
        torch.autograd.grad(lora_linears(x, Ws, biases, frozen, B_list, SCALES)[0].square().sum(), x, create_graph=True)


def test_half_precision_with_fp32_adapters():
    x, Ws, biases, A_list, B_list = operands(batch=(20,), dtype=torch.float32)
    low = x.detach().bfloat16().requires_grad_()
    outputs = lora_linears(low, [W.bfloat16() for W in Ws], [b.bfloat16() for b in biases], A_list, B_list, SCALES)
    found = gradients(outputs, [low, *A_list, *B_list])
    assert [y.dtype for y in outputs] == [torch.bfloat16] * 3
    assert [g.dtype for g in found] == [torch.bfloat16] + [torch.float32] * 6
    for mine, exact in zip(
        outputs, definition(x.double(), *([t.double() for t in z] for z in (Ws, biases, A_list, B_list)), SCALES), strict=True
    ):
        assert_close(mine.double(), exact, rtol=2**-5, atol=2**-3)


def test_under_autocast_in_its_dtype():
    x, Ws, biases, A_list, B_list = operands(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = lora_linears(x, Ws, biases, A_list, B_list, SCALES)
    assert outputs[0].dtype == torch.bfloat16
    assert [g.dtype for g in gradients(outputs, [x, A_list[0]])] == [torch.float32] * 2


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_backward_pass_under_autocast_is_in_the_dtype_of_the_forward_pass(create_graph):
    x, Ws, biases, A_list, B_list = operands(dtype=torch.float32)
    expected = gradients(lora_linears(x, Ws, biases, A_list, B_list, SCALES), [x, *A_list, *B_list])
    outputs = lora_linears(x, Ws, biases, A_list, B_list, SCALES)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        loss = sum((y * torch.randn_like(y)).sum() for y in outputs)
        found = torch.autograd.grad(loss, [x, *A_list, *B_list], create_graph=create_graph)
    assert_close(found, expected)


@pytest.mark.parametrize(("dropout", "scaled"), [(0.0, False), (0.5, False), (0.0, True)])
def test_compiled_it_is_two_operations_and_the_same_numbers(traced, dropout, scaled):
    x, Ws, biases, A_list, B_list = operands(dtype=torch.float32)
    out_scales = [torch.randn(4, requires_grad=True), None, torch.randn(3)] if scaled else ()
    leaves = [x, *A_list, *B_list, *out_scales[:1]]
    compiled, graphs = traced(lora_linears)
    mine = compiled(x, Ws, biases, A_list, B_list, SCALES, dropout, out_scales)
    found = gradients(mine, leaves)
    defined = lora_linears(x, Ws, biases, A_list, B_list, SCALES, dropout, out_scales)
    assert_close(mine, defined)
    assert_close(found, gradients(defined, leaves))
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes if "lightning_lora" in str(node.target)]
    assert names == ["lightning_lora.linears_forward.default", "lightning_lora.linears_backward.default"]
    # The compiler may not see products that it would do its own way.
    assert not [node for graph in graphs for node in graph.graph.nodes if "mm" in str(node.target)]


@pytest.mark.parametrize(("n", "kept"), [(0, 64), (3, 64), (3, 2)])
def test_operations_say_their_shapes_right(n, kept, monkeypatch):
    """What the compiler is told of an operation against what it does; with factors wider than those whose copies are kept too."""
    monkeypatch.setattr(factor_copies, "KEPT_RANK", kept)
    x, Ws, biases, A_list, B_list = (t.detach() if isinstance(t, torch.Tensor) else t for t in operands(dtype=torch.float32))
    x, A_list, B_list = x.reshape(-1, IN), [A.detach() for A in A_list], [B.detach() for B in B_list]
    out_scales = [torch.randn(len(B)) if k < n else None for k, B in enumerate(B_list)]
    forward = (x, None, 0, False, list(SCALES), Ws, [""] * 3, biases, A_list, B_list, out_scales)
    outputs, copies = fused_linear._forward(*forward), 4 * (kept == 64)
    dys, base_outputs = [torch.randn_like(y) for y in outputs[:3]], outputs[4 + copies :] or [None] * 3
    settings = (None, 0, False, list(SCALES), Ws, [""] * 3)
    backward = (dys, x, outputs[3], *settings, biases, A_list, B_list, out_scales, outputs[4 : 4 + copies], base_outputs, True)
    for operation, shapes, given in (
        (torch.ops.lightning_lora.linears_forward, fused_linear._forward_shapes, forward),
        (torch.ops.lightning_lora.linears_backward, fused_linear._backward_shapes, backward),
    ):
        real, told = operation(*given), shapes(*given)
        assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in told]
