"""FP8 products: codes and scales to the bit, the emulation against float64, the kernels against the emulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from lightning_lora.ops import float8
from tests.ops.operands import DEVICE, error, strided, tensor

STEP = 2**-4  # largest relative rounding of e4m3
LEAST = 2**-9 / 224  # of a row's largest entry, at most: the distance of the smallest numbers, whose rounding is half of it


def rows(*shape: int) -> Tensor:
    """Of very different size, within a row and between rows."""
    return tensor(*shape) * torch.logspace(-2, 2, shape[1], device=DEVICE) * torch.logspace(-6, 6, shape[0], device=DEVICE)[:, None]


def exact_scale(row: Tensor) -> float:
    """The least power of two with largest/scale ≤ 448."""
    scale = 1.0
    largest = row.abs().max().item()
    while largest / scale > 448:
        scale *= 2
    while largest / (scale / 2) <= 448:
        scale /= 2
    return scale


def test_rows_keep_three_bits_of_every_number() -> None:
    x = rows(13, 300)
    codes, scale = float8.quantize_rows([x], [None])
    assert codes.dtype == torch.float8_e4m3fn and scale.tolist() == [exact_scale(row) for row in x]
    back, exact = float8.dequantize(codes, scale, torch.float64), x.double()
    assert ((back - exact).abs() <= STEP * exact.abs() + LEAST / 2 * exact.abs().amax(1, keepdim=True)).all()
    assert torch.equal(float8.dequantize(codes, scale, torch.bfloat16).double(), back)  # exact in bf16


@pytest.mark.parametrize("largest", [448.0, 448.01, 1.75, 1.7500001, 1.0, 3.3e38, 1e-30, 1e-42, 0.0])
def test_the_scale_at_its_edges(largest: float) -> None:
    x = torch.tensor([[largest, -largest / 3, 0.0]], device=DEVICE)
    codes, scale = float8.quantize_rows([x], [None])
    back = float8.dequantize(codes, scale, torch.float64)
    assert back.isfinite().all() and back[0, 0] >= (1 - STEP) * x.double()[0, 0] - 2**-136
    if largest > 1e-30:
        assert scale.item() == exact_scale(x[0])


def test_quantizing_again_changes_nothing() -> None:
    x = torch.cat([rows(40, 64), torch.full((1, 64), 440.0, device=DEVICE), torch.full((1, 64), 228.0, device=DEVICE)])
    once = float8.dequantize(*float8.quantize_rows([x], [None]), torch.float32)
    assert torch.equal(float8.dequantize(*float8.quantize_rows([once], [None]), torch.float32), once)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_spoils_its_row_and_no_other(bad: float) -> None:
    x, w = tensor(3, 32), float8.quantize_rows([tensor(16, 32, seed=1)], [None])
    x[1, 5] = bad
    y = float8.product(*float8.quantize_rows([x], [None]), *w, torch.float32)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_the_product_is_that_of_what_the_codes_stand_for() -> None:
    (a, sa), (b, sb) = (float8.quantize_rows([rows(n, 80)], [None]) for n in (9, 33))
    A, B = float8.dequantize(a, sa, torch.float64), float8.dequantize(b, sb, torch.float64)
    assert error(float8.product(a, sa, b, sb, torch.float32), A @ B.t()) < 1e-6
    assert error(float8.product(a, sa, b, None, torch.float32), A @ b.double().t()) < 1e-6


@pytest.mark.parametrize("outs", [(48,), (32, 16, 16), (32, 16, 16, 64)])
def test_parts_side_by_side(outs: tuple[int, ...]) -> None:
    """dX = Σ dY·W from codes of W alone: its scales are in the rows of dY, and the sum is one product."""
    dYs = [tensor(7, n, seed=n) for n in outs]
    Ws = [float8.quantize_rows([rows(n, 80)], [None]) for n in outs]
    codes, scale = float8.quantize_rows(dYs, [s for _, s in Ws])
    assert codes.shape == (7, sum(outs)) and scale.shape == (7,)
    dX = float8.product(codes, scale, float8.transposed([w for w, _ in Ws]), None, torch.float32)
    exact = sum(dY.double() @ float8.dequantize(*W, torch.float64) for dY, W in zip(dYs, Ws, strict=True))
    assert 1e-3 < error(dX, exact) < STEP


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts digits off where it converts to e4m3, which a GPU rounds."""
    pytest.importorskip("triton")
    if DEVICE == "cuda":
        return
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if target != tl.float8e4nv:
            return convert(values, source, target, mode)
        return torch.from_numpy(values.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.mark.parametrize("shapes", [(48,), (5000,), (48, 16, 32), (300, 17)])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("make", [tensor, strided])
def test_kernels_quantize_to_the_same_bits(shapes: tuple[int, ...], scaled: bool, make: Any, casts: None) -> None:
    from lightning_lora.ops import triton_float8

    parts = [make(11, n, seed=n) * torch.logspace(-6, 6, 11, device=DEVICE)[:, None] for n in shapes]
    parts[0][3] = 0
    parts[-1][4, 2] = float("nan")
    scales = [2.0 ** torch.randint(-5, 6, (n,), device=DEVICE) if scaled else None for n in shapes]
    mine, exact = triton_float8.quantize_rows(parts, scales), float8.quantize_rows(parts, scales)
    assert torch.equal(mine[1].nan_to_num(-1), exact[1].nan_to_num(-1)) and mine[1].isnan().sum() == 1
    sound = ~mine[1].isnan()
    assert torch.equal(mine[0].view(torch.uint8)[sound], exact[0].view(torch.uint8)[sound])


@pytest.mark.parametrize("sizes", [(33,), (130, 5), (64, 128, 32)])
def test_kernels_transpose(sizes: tuple[int, ...], casts: None) -> None:
    from lightning_lora.ops import triton_float8

    weights = [torch.randint(0, 256, (n, 150), device=DEVICE, dtype=torch.uint8) for n in sizes]
    assert torch.equal(triton_float8.transposed(weights), float8.transposed(weights))
    assert torch.equal(float8.transposed(weights), torch.cat(weights).t())


def test_emulating_is_only_inside() -> None:
    from lightning_lora.ops.float8_weight import Float8Weight
    from lightning_lora.ops.frozen_linear import frozen_linear

    x, (codes, scale) = tensor(5, 32), float8.quantize_rows([tensor(48, 32, seed=1)], [None])
    dense = linear(x.double(), float8.dequantize(codes, scale, torch.float64))
    with float8.emulated():
        inside = frozen_linear(x, Float8Weight(codes, scale), 48)
    assert error(frozen_linear(x, Float8Weight(codes, scale), 48), dense) < 1e-6 and 1e-3 < error(inside, dense) < STEP


@pytest.mark.parametrize(
    ("times", "others", "noise"),  # what is lost of the other columns' product, and the whole product's error in units of theirs
    [(1, (0.03, 0.045), (0.03, 0.045)), (1e3, (0.03, 0.045), (0.5, 4)), (1e5, (0.1, 0.3), (50, 400)), (1e7, (0.95, 1), (5e3, 4e4))],
)
@pytest.mark.parametrize("where", ["input", "weight"])
def test_one_scale_a_row_and_one_column_that_is_far_larger(
    times: float, others: tuple[float, float], noise: tuple[float, float], where: str
) -> None:
    """The product stays within 4 %, of which the large column has all. The others keep their bits until it is 2¹⁸ times theirs; long
    before that, the rounding of the large column is as large as their product (bf16: 0.09 of it at 1000 times).
    """
    x, w = tensor(128, 512).cpu(), tensor(96, 512, seed=1).cpu()
    (x if where == "input" else w)[:, 7] *= times
    quantized = [float8.quantize_rows([rows], [None]) for rows in (x, w)]
    exact, found = x.double() @ w.double().t(), float8.product(*quantized[0], *quantized[1], torch.float32)
    small = [
        rows.double().index_fill(1, torch.tensor([7]), 0) for rows in (x, w, *(float8.dequantize(*q, torch.float64) for q in quantized))
    ]
    rest = small[0] @ small[1].t()
    assert 0.02 < error(found, exact) < 0.045
    assert others[0] < error(small[2] @ small[3].t(), rest) < others[1]
    assert noise[0] < ((found.double() - exact).norm() / rest.norm()).item() < noise[1]
