"""Packed stacks in place of a weight: products and derivatives of the dequantized matrices, in every format and orientation."""

import pytest
import torch
import torch.nn.functional as F

from lightning_lora.ops import frozen_stack
from lightning_lora.ops.frozen_weight import flatten_weights, unflatten_weights
from lightning_lora.quantization.block_float8_experts import BlockStackFormat
from lightning_lora.quantization.float8_stacks import Float8StackFormat
from lightning_lora.quantization.nf4_stacks import NF4StackFormat
from lightning_lora.quantization.stacks import Packed
from tests.quantized import linear4bit

E, M, N = 3, 16, 24
FORMATS = {"fp8": Float8StackFormat(), "nf4": NF4StackFormat(), "blocks": BlockStackFormat((10, 16))}
every = pytest.mark.parametrize("name", FORMATS)


def stack(name, transposed=False, shape=(E, M, N)):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, beside = FORMATS[name].pack(weight, transposed)
    return Packed(FORMATS[name], beside, weight.shape, torch.float32, transposed).stack(codes), weight


def x(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def close(mine, wanted):
    """To the rounding of fp32 sums in another order."""
    assert wanted.any() and (mine - wanted).norm() < 1e-5 * wanted.norm()


PRODUCTS = {
    "linear": lambda W, x: F.linear(x(2, 5, N), W[1], torch.ones(M)),
    "linear by index tensor": lambda W, x: F.linear(x(5, N), W[torch.tensor(2)]),
    "matmul": lambda W, x: x(5, M) @ W[0],
    "matmul of the transposed": lambda W, x: x(5, N).matmul(W[0].T),
    "from the left": lambda W, x: W[2] @ x(N, 5),
    "bmm": lambda W, x: torch.bmm(x(E, 4, M), W),
    "bmm, some of them, from the left": lambda W, x: torch.bmm(W[torch.tensor([2, 0, 2, 1])], x(4, N, 1)),
    "matmul of all, of one x": lambda W, x: torch.matmul(x(4, N), W.mT.contiguous()),
    "matmul of a slice": lambda W, x: torch.matmul(x(2, 4, M), W[1:]),
    "sorted rows": lambda W, x: F.grouped_mm(x(6, M), W, offs=torch.tensor([2, 2, 6], dtype=torch.int32)),
    "sorted rows of the transposed": lambda W, x: F.grouped_mm(x(6, N), W.mT, offs=torch.tensor([2, 2, 6], dtype=torch.int32)),
}


@every
@pytest.mark.parametrize("together", [E, 1])
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products_and_gradients_are_those_of_the_dense_matrices(name, product, together, monkeypatch):
    monkeypatch.setattr(frozen_stack, "MOST", together * M * N * 4)
    W, _ = stack(name)
    dense, given = W.dense(torch.float32), []

    def leaf(*shape):
        given.append(x(*shape))
        return given[-1]

    found, wanted = product(W, leaf), product(dense, leaf)
    close(found, wanted)
    mine, theirs = (
        torch.autograd.grad(y.square().sum(), leaf, create_graph=True)[0] for y, leaf in zip((found, wanted), given, strict=True)
    )
    close(mine, theirs)
    again = [torch.autograd.grad(g.square().sum(), leaf)[0] for g, leaf in zip((mine, theirs), given, strict=True)]
    close(*again)


@every
@pytest.mark.parametrize("transposed", [False, True])
def test_the_matrices_are_nearly_what_they_were(name, transposed):
    W, plain = stack(name, transposed)
    error = (W.dense(torch.float64) - plain).norm() / plain.norm()
    assert 0 < error < {"fp8": 0.03, "nf4": 0.1, "blocks": 0.03}[name]
    assert torch.equal(W.mT.dense(torch.float32), W.dense(torch.float32).mT)
    assert torch.equal(W[1].dense(torch.float32), W.dense(torch.float32)[1]) and torch.equal(
        W[1:].dense(torch.float32), W.dense(torch.float32)[1:]
    )
    if name == "fp8":  # scales are powers of two: packing it again changes nothing, and it is exact in bf16
        codes, beside = FORMATS[name].pack(W.dense(torch.float32), transposed)
        again = Packed(FORMATS[name], beside, plain.shape, torch.float32).stack(codes)
        assert torch.equal(again.dense(torch.float32), W.dense(torch.float32))
        assert torch.equal(W.dense(torch.bfloat16).float(), W.dense(torch.float32))
        assert W.tensors[1].shape == ((E, 1, N) if transposed else (E, M, 1))


@every
def test_under_a_compiler_a_stack_is_tensors_and_a_string(name, monkeypatch):
    W, _ = stack(name)
    for each in (W, W.mT, W[torch.tensor([2, 0])]):
        monkeypatch.setattr("lightning_lora.utils.custom_op.without_values", True)
        tensors, layouts = flatten_weights([each])
        monkeypatch.undo()
        assert all(isinstance(layout, str) for layout in layouts)
        (again,) = unflatten_weights(tensors, layouts)
        assert torch.equal(again.dense(torch.float32), each.dense(torch.float32)) and again.shape == each.shape


def test_nf4_matrices_are_those_of_a_linear4bit():
    """Of 4 KiB of scales, so that the second level has several."""
    W, plain = stack("nf4", shape=(2, 128, 160))
    layer = linear4bit(128, 160)
    layer.weight = type(layer.weight)(plain[1].clone(), requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")
    assert torch.equal(layer.weight.data.flatten(), W.tensors[0][1])
    _, scales, offset, outer, _, _ = W[1].tensors
    state = layer.weight.quant_state
    assert torch.equal(scales, state.absmax) and torch.equal(offset, state.offset.reshape(())) and torch.equal(outer, state.state2.absmax)
    assert outer.numel() > 1


def test_what_the_code_may_ask_and_what_not():
    W, _ = stack("fp8")
    told = (tuple(W.shape), W.dtype, W.ndim, W.size(-1), len(W), W.device.type, W.numel(), W.element_size(), W.requires_grad, W.mT.shape[1])
    assert told == ((E, M, N), torch.float32, 3, N, E, "cpu", E * M * N, 4, False, N)
    for wrong in (
        lambda: W + 1, lambda: W.sum(), lambda: torch.softmax(W, 0), lambda: W[None], lambda: W.transpose(0, 1),
        lambda: F.grouped_mm(x(6, M), W, offs=torch.tensor([2, 2, 6], dtype=torch.int32), bias=torch.ones(E, N)),
    ):  # fmt: skip
        with pytest.raises((ValueError, AttributeError, TypeError)):
            wrong()


def test_under_autocast_and_transforms():
    W, _ = stack("fp8")
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x(5, N), W[0]).dtype == torch.bfloat16
    each = torch.func.vmap(torch.func.grad(lambda v: F.linear(v, W[0]).sum()))(x(5, N))
    torch.testing.assert_close(each, W.dense(torch.float32)[0].sum(0).expand(5, N))
