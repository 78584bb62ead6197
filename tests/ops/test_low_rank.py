"""`lora_update` against its definition: values, gradients, second gradients, dropout, dtypes, memory, compilers, transforms."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from lightning_lora.ops import plain
from lightning_lora.ops.low_rank import lora_update, lora_update_reference

IN, OUT, RANK = 5, 4, 3
SHAPES = {"1d": (), "2d": (6,), "3d": (2, 3), "4d": (2, 1, 3), "empty": (0,), "empty-3d": (0, 3)}


def operands(*batch, dtype=torch.float64, requires_grad=True):
    sizes = ((*batch, OUT), (*batch, IN), (RANK, IN), (OUT, RANK))
    return [torch.randn(size, dtype=dtype, requires_grad=requires_grad) for size in sizes]


def run(function, tensors, weight, **kwargs):
    """Output and all gradients; y goes in as a fresh tensor, as a layer's output is."""
    y, *rest = leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(y * 1 if kwargs else y, *rest, 0.7, **kwargs)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("batch", SHAPES.values(), ids=SHAPES)
def test_equals_the_definition_with_every_gradient(batch, inplace):
    tensors, weight = operands(*batch), torch.randn(*batch, OUT, dtype=torch.float64)
    for mine, defined in zip(run(lora_update, tensors, weight, inplace=inplace), run(lora_update_reference, tensors, weight), strict=True):
        torch.testing.assert_close(mine, defined, rtol=1e-12, atol=1e-12)


def test_the_reference_is_the_papers_formula():
    y, x, A, B = operands(6)
    torch.testing.assert_close(lora_update_reference(y, x, A, B, 0.5), y + 0.5 * torch.stack([B @ (A @ row) for row in x]))


@pytest.mark.parametrize("inplace", [False, True])
def test_strided_operands(inplace):
    y, x, A, B = operands(OUT, IN, requires_grad=False)
    tensors = [y.transpose(0, 1), x.transpose(0, 1), A.t().contiguous().t(), B.t().contiguous().t()]
    assert not any(t.is_contiguous() for t in tensors)
    expected = lora_update_reference(*tensors, 0.7)
    torch.testing.assert_close(lora_update(*tensors, 0.7, inplace=inplace), expected)
    weight = torch.randn(OUT, IN, OUT, dtype=torch.float64).transpose(0, 1)
    for mine, defined in zip(run(lora_update, tensors, weight, inplace=inplace), run(lora_update_reference, tensors, weight), strict=True):
        torch.testing.assert_close(mine, defined)


def test_inplace_writes_to_y_and_otherwise_not():
    y, x, A, B = operands(6, requires_grad=False)
    before = y.clone()
    out = lora_update(y, x, A, B, 0.7)
    assert torch.equal(y, before)
    assert lora_update(y, x, A, B, 0.7, inplace=True) is y or y.data_ptr() == out.data_ptr()
    torch.testing.assert_close(y, out)


def test_inplace_leaves_a_strided_y_alone():
    y, x, A, B = operands(3, 4, requires_grad=False)
    y = torch.randn(4, 3, OUT, dtype=torch.float64).transpose(0, 1)
    before = y.clone()
    torch.testing.assert_close(lora_update(y, x, A, B, 0.7, inplace=True), lora_update_reference(before, x, A, B, 0.7))
    assert torch.equal(y, before)


@pytest.mark.parametrize("needs", [n for n in product([False, True], repeat=4) if any(n)])
def test_only_the_gradients_asked_for(needs):
    tensors = [t.detach().requires_grad_(need) for t, need in zip(operands(6), needs, strict=True)]
    wanted = [t for t in tensors if t.requires_grad]
    mine = torch.autograd.grad(lora_update(*tensors, 0.7).square().sum(), wanted)
    defined = torch.autograd.grad(lora_update_reference(*tensors, 0.7).square().sum(), wanted)
    torch.testing.assert_close(mine, defined)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradcheck_and_gradgradcheck(dropout, inplace):
    """Finite differences with the seed held: the backward pass, and the one after it, use the forward's mask."""

    def function(y, x, A, B):
        torch.manual_seed(5)
        return lora_update(y * 1, x, A, B, 0.7, dropout, inplace=inplace)

    tensors = operands(2, 3)
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


def mask_of(dropout, *batch, size=64, **kwargs):
    """With y=0, x=1, A=B=I and scale 1 the output is the dropout mask itself, kept entries scaled up."""
    x, eye = torch.ones(*batch, size, requires_grad=True), torch.eye(size)
    out = lora_update(torch.zeros(*batch, size), x, eye, eye, 1.0, dropout, **kwargs)
    return x, out


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_drops_and_scales(dropout):
    x, out = mask_of(dropout, 500)
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - dropout)), rtol=1e-4, atol=0)
    n = out.numel()
    assert abs(kept.float().mean().item() - (1 - dropout)) < 4 * (dropout * (1 - dropout) / n) ** 0.5
    assert abs(out.mean().item() - 1) < 4 * (dropout / (1 - dropout) / n) ** 0.5
    assert out.var().item() == pytest.approx(dropout / (1 - dropout), rel=0.05)
    # Every entry of every row is dropped on its own.
    assert kept.float().mean(0).std() > 0
    assert kept.float().mean(1).std() > 0
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, out.detach())


def test_dropout_masks_differ_from_call_to_call():
    (_, first), (_, second) = mask_of(0.5, 20), mask_of(0.5, 20)
    assert not torch.equal(first, second)


def test_dropout_spares_the_base_output():
    y, x, A, B = operands(6, requires_grad=False)
    assert torch.equal(lora_update(y, x, A, B * 0, 0.7, 0.5), y)


def test_dropout_gradients_of_a_and_b_belong_to_the_mask_of_the_forward_pass():
    x = torch.randn(3, 6, IN, dtype=torch.float64)
    A, B = torch.eye(IN, dtype=torch.float64, requires_grad=True), torch.eye(IN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, IN, dtype=torch.float64)
    out = lora_update(torch.zeros_like(x), x, A, B, 2.0, 0.5)
    dropped = out.detach() / 2  # B·A is the identity
    assert 0 < dropped.count_nonzero() < dropped.numel()
    dA, dB = torch.autograd.grad((out * weight).sum(), [A, B])
    A2, B2 = A.detach().requires_grad_(), B.detach().requires_grad_()
    defined = torch.autograd.grad((F.linear(F.linear(dropped, A2), B2) * 2 * weight).sum(), [A2, B2])
    torch.testing.assert_close((dA, dB), defined)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_half_precision_base_keeps_no_fp32_activation(dtype, dropout):
    y, x = torch.randn(16, 64, dtype=dtype), torch.randn(16, 64, dtype=dtype, requires_grad=True)
    A, B = torch.randn(2, 64, requires_grad=True), torch.randn(64, 2, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = lora_update(y, x, A, B, 0.5, dropout)
    big = [t for t in saved if t.numel() >= x.numel()]
    assert [t.dtype for t in big] == [dtype, torch.bool][: 1 + bool(dropout)]
    assert big[0].data_ptr() == x.data_ptr()  # the neighbours keep it anyway
    assert not any(t.dtype == torch.float32 and t.numel() >= x.numel() for t in saved)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert (x.grad.dtype, A.grad.dtype, B.grad.dtype) == (dtype, torch.float32, torch.float32)


def test_half_precision_result_is_as_close_as_the_dtype_allows():
    y, x, A, B = operands(32, dtype=torch.float32, requires_grad=False)
    exact = lora_update_reference(y.double(), x.double(), A.double(), B.double(), 0.7)
    mine = lora_update(y.bfloat16(), x.bfloat16(), A, B, 0.7)
    torch.testing.assert_close(mine.double(), exact, rtol=2**-6, atol=2**-4)


def test_fp32_saves_x_once_and_the_rank_r_product_and_y_never():
    y, x, A, B = operands(16, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_update(y, x, A, B, 0.7)
    kept = [t for t in saved if t.shape[0] == 16]
    assert sorted(t.shape[1] for t in kept) == [RANK, IN] and [t.data_ptr() for t in kept if t.shape[1] == IN] == [x.data_ptr()]


def test_under_autocast_the_base_output_decides_the_dtype():
    """y in bf16 (a linear's): bf16. y in fp32 (an operation that autocast leaves alone): no rounding to bf16 within."""
    y, x, A, B = operands(6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = lora_update(y.bfloat16(), x, A, B, 0.7)
        high = lora_update(y, x, A, B, 0.7)
        low.float().sum().backward()
    assert (low.dtype, high.dtype, A.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(high, lora_update_reference(y, x, A, B, 0.7), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(low.float(), high, rtol=2**-5, atol=2**-4)


def test_float64_x_on_a_float32_base_comes_back_in_float32():
    y, x, A, B = operands(6, requires_grad=False)
    assert lora_update(y.float(), x, A, B, 0.7).dtype == torch.float32


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_to_one_graph_with_the_same_gradients(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda y, *rest: lora_update(y * 1, *rest), backend=backend, fullgraph=True)
    tensors, weight = operands(6), torch.randn(6, OUT, dtype=torch.float64)
    for mine, defined in zip(run(compiled, tensors, weight), run(lora_update_reference, tensors, weight), strict=True):
        torch.testing.assert_close(mine, defined)


def test_torch_func_grad_and_vmap():
    y, x, A, B = operands(6, requires_grad=False)

    def loss(A, B, y, x):
        return lora_update(y, x, A, B, 0.7).square().sum()

    dA, dB = torch.func.grad(loss, argnums=(0, 1))(A, B, y, x)
    each_A, each_B = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), (None, None, 0, 0))(A, B, y, x)
    A, B = A.requires_grad_(), B.requires_grad_()
    defined = torch.autograd.grad(lora_update_reference(y, x, A, B, 0.7).square().sum(), [A, B])
    torch.testing.assert_close((dA, dB), defined)
    torch.testing.assert_close((each_A.sum(0), each_B.sum(0)), defined)  # per-sample gradients add up


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_frozen_a_keeps_no_x(dropout):
    """LoRA-FA on bases that have products of their own, quantized ones: t is kept in the place of x."""
    y, x, A, B = operands(50)
    saved = []
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = lora_update(y * 1, x, A.detach(), B, 0.7, dropout)
    assert sorted(t.shape[1] for t in saved if t.shape[0] == 50) == [RANK] + [IN] * bool(dropout)  # and the mask, a byte an entry
    found = torch.autograd.grad(out.square().sum(), [y, x, B])
    torch.manual_seed(1)
    defined = lora_update(y * 1, x, A, B, 0.7, dropout)
    torch.testing.assert_close(found, torch.autograd.grad(defined.square().sum(), [y, x, B]))

    def twice(A):
        torch.manual_seed(1)
        (dx,) = torch.autograd.grad(lora_update(y * 1, x, A, B, 0.7, dropout).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, B])

    torch.testing.assert_close(twice(A.detach()), twice(A))  # no second derivative needs x


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8), (8,), (0, 8), (2, 0, 8)])
def test_the_output_may_be_written_into_in_place(shape):
    """As by an activation in place, or `mlp_output += attention_output`; the gradients are those of the definition."""
    g = torch.Generator().manual_seed(0)
    x, A, B = (torch.randn(*size, generator=g, dtype=torch.float64) for size in (shape, (2, 8), (6, 2)))
    W = torch.randn(6, 8, generator=g, dtype=torch.float64)
    gradients = []
    for update in (lora_update, lora_update_reference):
        leaves = [t.clone().requires_grad_() for t in (x, A, B)]
        y = update(leaves[0] @ W.T, *leaves, 0.5)
        y *= 2
        torch.relu_(y)
        gradients.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dropout", [2**-18, 1 - 2**-18, 1 - 2**-16, 0.999995, 1 - 2**-53])
def test_a_probability_near_its_bounds_is_rounded_within_them(dropout):
    """A CPU draws multiples of 2⁻¹⁶. At 1 nothing would be left, and the factor that compensates would be infinite."""
    drop, probability = plain.draw_drop(torch.ones(64, 64), dropout)
    assert 0 <= probability < 1 and abs(probability - dropout) <= 2**-16
    assert drop.source.double().mean() == pytest.approx(probability, abs=2e-3)
    x = torch.randn(3, 5, requires_grad=True)
    y = lora_update(torch.zeros(3, 4), x, torch.randn(2, 5), torch.randn(4, 2), 1.0, dropout)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
