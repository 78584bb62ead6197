"""FP8 weights in the operations that multiply by them: dequantized, emulated, and on a GPU with FP8 tensor cores beside the emulation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.nn.functional import linear, silu

from lightning_lora.ops import backends, float8, float8_weight
from lightning_lora.ops.float8_weight import Float8Weight
from lightning_lora.ops.frozen_linear import frozen_linear
from lightning_lora.ops.frozen_weight import unflatten_weights
from lightning_lora.ops.fused_linear import lora_linears
from tests.ops.operands import DEVICE, error, tensor

ROWS, IN, OUTS, RANKS, SCALES = 24, 64, (48, 16, 32), (3, 2, 4), (0.7, 2.0, 0.7)
WIDE = 96
MLP = [(WIDE, IN), (WIDE, IN), (48, WIDE)]
FLOAT8 = DEVICE == "cuda" and torch.cuda.get_device_capability() >= (8, 9)
ROUGH = 0.06  # relative, of what random rows lose in e4m3; 2⁻⁴ is the most that an entry loses


def operands(shapes: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """x, FP8 weights, the same dequantized in float64, and factors."""
    backends.look_at(torch.device(DEVICE, 0 if DEVICE == "cuda" else None))
    weights = [Float8Weight(*float8.quantize_rows([tensor(*shape, seed=k) * 0.2], [None])) for k, shape in enumerate(shapes)]
    A_list = [(tensor(r, width, seed=r) * 0.1).requires_grad_() for r, (_, width) in zip(RANKS, shapes, strict=True)]
    B_list = [(tensor(out, r, seed=r) * 0.1).requires_grad_() for r, (out, _) in zip(RANKS, shapes, strict=True)]
    x = tensor(ROWS, shapes[0][1], dtype=dtype).requires_grad_()
    return x, weights, [W.dense(torch.float64) for W in weights], A_list, B_list


def definition(x: Tensor, Ws: list[Tensor], biases: list[Any], A_list: list[Tensor], B_list: list[Tensor]) -> list[Tensor]:
    x = x.double()
    rows = zip(Ws, biases, A_list, B_list, SCALES, strict=True)
    return [linear(x, W, None if b is None else b.double()) + linear(linear(x, A.double()), B.double()) * s for W, b, A, B, s in rows]


def gated(x: Tensor, Ws: list[Tensor], A_list: list[Tensor], B_list: list[Tensor]) -> Tensor:
    def project(z: Tensor, k: int) -> Tensor:
        return linear(z, Ws[k]) + linear(linear(z, A_list[k].double()), B_list[k].double()) * SCALES[k]

    x = x.double()
    return project(silu(project(x, 0)) * project(x, 1), 2)


def gradients(outputs: Any, leaves: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    total = sum((y * tensor(*y.shape, seed=7).to(y.dtype)).sum() for y in outputs)
    return torch.autograd.grad(total, leaves, **options)


def errors(mine: Any, exact: Any) -> list[float]:
    return [error(a, b) for a, b in zip(mine, exact, strict=True)]


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each quantization took."""
    calls: list[int] = []
    quantize = float8.quantize_rows
    monkeypatch.setattr(float8, "quantize_rows", lambda parts, scales: calls.append(len(parts)) or quantize(parts, scales))
    return calls


@pytest.mark.parametrize("emulated", [False, True])
def test_linears_are_the_definition_with_every_gradient(emulated: bool, quantized: list[int]) -> None:
    """Exactly with dequantized weights; but for the rounding of x and dY in FP8. Siblings quantize x once, and their gradients at once."""
    x, weights, Ws, A_list, B_list = operands([(out, IN) for out in OUTS])
    biases, leaves = [tensor(OUTS[0]), None, None], [x, *A_list, *B_list]
    quantized.clear()
    with float8.emulated() if emulated else nullcontext():
        mine = lora_linears(x, weights, biases, A_list, B_list, SCALES)
        found = gradients(mine, leaves)
    assert quantized == ([1, 3] if emulated else [])
    exact = definition(x, Ws, biases, A_list, B_list)
    worst = errors([*mine, *found], [*exact, *gradients(exact, leaves)])
    assert max(worst) < (ROUGH if emulated else 2e-6)
    if emulated:
        assert min(worst[:4]) > 1e-3 and max(worst[4:]) < 2e-6  # y and dx; the adapters' own products are of the unquantized x and dY


def test_more_siblings_than_a_pass_takes(quantized: list[int]) -> None:
    _, weights, Ws, _, _ = operands([(out, IN) for out in OUTS])
    grads = [tensor(ROWS, W.shape[0], seed=k) for k, W in enumerate(Ws * 2)]
    exact = sum(grad.double() @ W for grad, W in zip(grads, Ws * 2, strict=True))
    quantized.clear()
    with float8.emulated():
        assert error(Float8Weight.input_gradient(weights * 2, grads, torch.float32), exact) < ROUGH
    assert quantized == [3, 3]
    assert error(Float8Weight.input_gradient(weights * 2, grads, torch.float32), exact) < 2e-6


@pytest.mark.parametrize("emulated", [False, True])
def test_a_gated_mlp(emulated: bool) -> None:
    pytest.importorskip("triton")
    from lightning_lora.ops.gated_mlp import lora_gated_mlp

    x, weights, Ws, A_list, B_list = operands(MLP)
    leaves = [x, *A_list, *B_list]
    with float8.emulated() if emulated else nullcontext():
        mine = lora_gated_mlp(x, weights, A_list, B_list, SCALES)
        found = gradients([mine], leaves)
    exact = gated(x, Ws, A_list, B_list)
    worst = errors([mine, *found], [exact, *gradients([exact], leaves)])
    assert max(worst) < (2 * ROUGH if emulated else 2e-5) and (not emulated or worst[0] > 1e-3)


@pytest.mark.skipif(not FLOAT8, reason="there is no GPU that multiplies FP8")
@pytest.mark.parametrize("what", ["linears", "gated mlp", "base"])
def test_a_gpu_gives_what_the_emulation_gives(what: str) -> None:
    """To the rounding of bf16 and of the tensor cores' sums."""
    from lightning_lora.ops.gated_mlp import lora_gated_mlp

    x, weights, Ws, A_list, B_list = operands(MLP if what == "gated mlp" else [(out, IN) for out in OUTS], torch.bfloat16)
    leaves = [x, *A_list, *B_list] if what != "base" else [x]

    def run() -> list[Tensor]:
        if what == "gated mlp":
            outputs: Any = [lora_gated_mlp(x, weights, A_list, B_list, SCALES)]
        elif what == "linears":
            outputs = lora_linears(x, weights, [tensor(OUTS[0]), None, None], A_list, B_list, SCALES)
        else:
            outputs = [frozen_linear(x, W, W.tensors[0].shape[0]) for W in weights]
        return [*outputs, *gradients(outputs, leaves)]

    mine = run()
    with float8.emulated():
        emulated = run()
    assert max(errors(mine, [t.double() for t in emulated])) < 2e-2
    assert what != "base" or 1e-2 < error(mine[0], linear(x.double(), Ws[0])) < ROUGH  # it did multiply in FP8


def test_the_base_alone() -> None:
    x, (W, *_), (exact, *_), _, _ = operands([(out, IN) for out in OUTS])
    y = frozen_linear(x.view(4, 6, IN), W, OUTS[0])
    assert y.shape == (4, 6, OUTS[0]) and error(y.flatten(0, 1), linear(x.double(), exact)) < 2e-6
    first = gradients([y.square()], [x], create_graph=True)
    wanted = gradients([linear(x.double(), exact).view(y.shape).square()], [x], create_graph=True)
    assert error(first[0], wanted[0]) < 1e-5
    second, exact_second = (torch.autograd.grad(g[0].square().sum(), x)[0] for g in (first, wanted))
    assert error(second, exact_second.double()) < 1e-5
    jacobian = torch.func.jacrev(lambda row: frozen_linear(row, W, OUTS[0]))(x[0].detach())
    assert error(jacobian, exact) < 2e-6
    with torch.autocast(DEVICE, torch.bfloat16):
        half = frozen_linear(x, W, W.tensors[0].shape[0])
        (dx,) = gradients([half.float()], [x])
    assert half.dtype == torch.bfloat16 and dx.dtype == torch.float32
    assert error(half, linear(x.double(), exact)) < (ROUGH if FLOAT8 else 8e-3)


def test_nothing_dense_is_kept() -> None:
    x, (W, *_), _, _, _ = operands([(out, IN) for out in OUTS])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        frozen_linear(x, W, W.tensors[0].shape[0])
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in W.tensors}


@pytest.fixture
def compiled(traced: Any) -> Iterator[Any]:
    yield traced
    torch._dynamo.reset()


@pytest.mark.parametrize("emulated", [False, True])
def test_compiled_it_is_two_operations(compiled: Any, emulated: bool) -> None:
    x, weights, _, A_list, B_list = operands([(out, IN) for out in OUTS])
    leaves = [x, *A_list, *B_list]
    function, graphs = compiled(lora_linears)
    with float8.emulated() if emulated else nullcontext():
        outputs = function(x, weights, [None] * 3, A_list, B_list, SCALES)
        found = gradients(outputs, leaves)
        eager = lora_linears(x, weights, [None] * 3, A_list, B_list, SCALES)
        torch.testing.assert_close((outputs, found), (eager, gradients(eager, leaves)))
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert [name for name in targets if "lightning_lora" in name] == [
        f"lightning_lora.linears_{way}.default" for way in ("forward", "backward")
    ]
    alone, graphs = compiled(frozen_linear)
    y = alone(x, weights[0], OUTS[0])
    assert torch.equal(y, frozen_linear(x, weights[0], OUTS[0]))
    assert "lightning_lora.frozen_product.default" in [str(node.target) for node in graphs[0].graph.nodes]


def test_operations_say_their_shapes_right() -> None:
    x, (W, *_), _, _, _ = operands([(out, IN) for out in OUTS])
    stored = W.tensors[0].view(torch.uint8), W.tensors[1]  # torch compares no e4m3 tensors
    for name, first, features in (("frozen_product", x, OUTS[0]), ("frozen_gradient", tensor(ROWS, OUTS[0]), IN)):
        operands_ = (first.detach(), list(stored), [W.layout], features)
        library.opcheck(getattr(torch.ops.lightning_lora, name).default, operands_, test_utils=["test_schema", "test_faketensor"])
    (again,) = unflatten_weights(W.tensors, [W.layout])
    assert type(again) is Float8Weight and again.tensors == W.tensors


def test_sizes_that_tensor_cores_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "multiplies_float8", lambda x: True)
    for shape in ((40, 64), (64, 40)):
        W = Float8Weight(torch.zeros(shape, dtype=torch.uint8), torch.ones(shape[0]))
        assert float8_weight._kernels([W], torch.ones(2, shape[1])) is None
    W = Float8Weight(torch.zeros(64, 64, dtype=torch.uint8), torch.ones(64))
    assert float8_weight._kernels([W], torch.ones(0, 64)) is None  # no token, as an expert may get
    assert frozen_linear(torch.ones(0, 64), W, 64).shape == (0, 64)
