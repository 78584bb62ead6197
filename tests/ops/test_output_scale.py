"""An output scale as a pass of its own: for what is not computed as one operation."""

import pytest
import torch

from lightning_lora.ops.output_scale import apply_output_scale


@pytest.mark.parametrize(
    ("shape", "vector"), [((5, 3), (3,)), ((2, 4, 3), (3,)), ((3,), (3,)), ((2, 3, 4, 2), (3, 1, 1)), ((3, 4), (3, 1))]
)
@pytest.mark.parametrize("bias", [False, True])
def test_first_and_second_derivatives(shape, vector, bias):
    z, out_scale, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, vector, vector))
    b = b if bias else None
    torch.testing.assert_close(apply_output_scale(z, out_scale, b), out_scale * z if b is None else out_scale * (z - b) + b)
    assert torch.autograd.gradcheck(apply_output_scale, (z, out_scale, b))
    assert torch.autograd.gradgradcheck(apply_output_scale, (z, out_scale, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_changes_of_the_scale_are_felt_in_half_precision(dtype):
    """g = 1.003 rounds to 1 in bf16; its effect on outputs must not."""
    z, out_scale = torch.linspace(1, 2, 256).view(64, 4).to(dtype), torch.full((4,), 1.003)
    assert out_scale.to(torch.bfloat16).eq(1).all()
    y = apply_output_scale(z, out_scale, None)
    assert y.dtype == dtype
    assert (y.double().mean() / (z.double() * 1.003).mean() - 1).abs() < 1e-3


# In fp16 a scale below the normal numbers loses digits by itself: 1e-6 is known there to 3 %.
SCALES = [
    (dtype, scale)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for scale in (1e-6, 1.3e-4, 2e-3, 0.1, 1.0, 30.0)
    if scale > torch.finfo(dtype).tiny
]


@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_scale_far_from_one_costs_no_digits(dtype, scale, bias):
    """As g = m/‖W + s·B·A‖ is, where the update is large: rounding is that of the terms, not of z."""
    z = torch.randn(50, 7).mul(1 / scale).clamp(-6e4, 6e4).to(dtype)
    out_scale, b = torch.rand(7).add(0.5).mul(scale), torch.randn(7).to(dtype) if bias else None
    z.requires_grad_()
    y = apply_output_scale(z, out_scale, b)
    exact = out_scale.double() * z.double() + (0 if b is None else (1 - out_scale.double()) * b.double())
    terms = (out_scale.double() * z.double()).abs() + (0 if b is None else (1 - out_scale.double()).abs() * b.double().abs())
    assert ((y.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * terms + torch.finfo(dtype).tiny).all()
    (grad,) = torch.autograd.grad(y.float().sum(), z)
    assert ((grad.double() - out_scale.double()).abs() <= 2 * torch.finfo(dtype).eps * out_scale.double()).all()
    assert torch.equal(apply_output_scale(z, torch.ones(7), b), z)


@pytest.mark.parametrize("bias", [False, True])
def test_a_compiler_sees_plain_operations_and_the_same_numbers(bias):
    torch._dynamo.reset()
    z, out_scale, b = torch.randn(5, 3, requires_grad=True), torch.randn(3, requires_grad=True), torch.randn(3) if bias else None
    compiled = torch.compile(apply_output_scale, backend="aot_eager", fullgraph=True)
    outputs = [function(z, out_scale, b) for function in (apply_output_scale, compiled)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), [z, out_scale]) for y in outputs))
