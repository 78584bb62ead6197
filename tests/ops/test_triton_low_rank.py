"""The Triton kernels against the plain functions in float64: every size, rank and stride, with and without dropout."""

import pytest
import torch

pytest.importorskip("triton")

from lightning_lora.ops import plain, triton_low_rank
from tests.ops.operands import DEVICE, DTYPES, TOLERANCE, error, strided, tensor

# tokens, features, rank
SIZES = [(70, 48, 5), (130, 136, 16), (64, 300, 40), (17, 24, 1), (33, 160, 100), (33, 72, 32), (70, 72, 64), (33, 72, 128), (20, 72, 256)]
MAKERS = {"contiguous": tensor, "strided": strided}


def drop_of(x, p):
    """A seed for the kernels and the same mask as a tensor for the plain functions; read off the kernel itself."""
    drop, exact = triton_low_rank.draw_drop(x, p)
    zeros, ones = torch.zeros(x.shape, device=x.device), torch.ones(max(x.shape), 1, device=x.device)
    mask = triton_low_rank.add_(zeros, ones[: x.shape[0]], ones[: x.shape[1]], drop) == 0
    return drop, plain.Drop(mask), exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "cols", "rank"), SIZES)
def test_equal_the_plain_functions(rows, cols, rank, p, make, dtype):
    x, y = make(rows, cols, dtype=dtype), make(rows, cols, dtype=dtype, seed=1)
    A, t = make(rank, cols, dtype=dtype), make(rows, rank, dtype=dtype)
    drop, mask = drop_of(x, p)[:2] if p else (None, None)
    x64, y64, A64, t64 = (z.double() for z in (x, y, A, t))
    for name, mine, exact in (
        ("project", triton_low_rank.project(x, A, drop, 0.7), plain.project(x64, A64, mask, 0.7)),
        ("reduce", triton_low_rank.reduce(t, x, drop), plain.reduce(t64, x64, mask)),
        ("add_", triton_low_rank.add_(y, t, A.t(), drop), plain.add_(y64, t64, A64.t(), mask)),
    ):
        assert error(mine, exact) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "cols", "rank"), [(70, 48, 5), (130, 136, 16), (33, 160, 100)])
def test_with_a_scale(rows, cols, rank, bias, dtype):
    z, dy, t, B = strided(rows, cols, dtype=dtype), strided(rows, cols, dtype=dtype, seed=1), strided(rows, rank), tensor(rank, cols).t()
    t, B, b, out_scale = t.to(dtype), B.to(dtype), tensor(cols, dtype=dtype) if bias else None, tensor(cols, seed=2)
    z64, dy64, t64, B64, scale64, b64 = (None if v is None else v.double() for v in (z, dy, t, B, out_scale, b))
    exact = (z64 + t64 @ B64.t() if b64 is None else z64 - b64 + t64 @ B64.t()) * scale64
    for kernels in (triton_low_rank, plain):
        tolerance = TOLERANCE[dtype] * (1 if kernels is triton_low_rank else 3)
        assert error(kernels.scaled_sum(z, t, B, out_scale, b), exact + (0 if b64 is None else b64)) < tolerance
        dz, dB, d_out_scale = kernels.scaled_sum_backward(dy, z, t, B, out_scale, b)
        assert error(dz, dy64 * scale64) < tolerance
        assert error(dB, (dy64 * scale64).t() @ t64) < tolerance
        assert error(d_out_scale, (dy64 * exact / scale64).sum(0)) < tolerance and d_out_scale.dtype == out_scale.dtype


def test_a_scale_of_one_changes_nothing_of_an_output():
    z, t, B = tensor(20, 40), tensor(20, 4), tensor(40, 4) * 0
    for kernels in (triton_low_rank, plain):
        for bias in (None, tensor(40)):
            assert torch.equal(kernels.scaled_sum(z, t, B, torch.ones(40, device=DEVICE), bias), z)


def test_a_gradient_that_a_sum_expanded():
    """Its rows and columns all lie on one number in memory."""
    expanded, x = tensor(1, 1).expand(70, 48), tensor(70, 5)
    drop, mask, _ = drop_of(x, 0.3)
    assert (
        error(triton_low_rank.project(expanded, tensor(5, 48)), plain.project(expanded.double(), tensor(5, 48).double()))
        < TOLERANCE[x.dtype]
    )
    for mine, exact in ((None, None), (drop, mask)):
        assert error(triton_low_rank.reduce(expanded, x, mine), plain.reduce(expanded.double(), x.double(), exact)) < TOLERANCE[x.dtype]


def test_add_writes_nowhere_else():
    wide = torch.zeros(20, 40, device=tensor(1).device)
    triton_low_rank.add_(wide[3:12, 5:29], tensor(9, 4), tensor(24, 4))
    assert wide[3:12, 5:29].abs().min() > 0
    assert not wide[:3].any() and not wide[12:].any() and not wide[:, :5].any() and not wide[:, 29:].any()


def test_splitting_covers_every_row_once():
    for rows in (1, 63, 64, 65, 1000, 8192, 8193):
        for programs in (1, 7, 500, 5000):
            parts, span = triton_low_rank.split(rows, 64, programs)
            assert span % 64 == 0
            assert (parts - 1) * span < rows <= parts * span


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_each_entry_on_its_own(p):
    x = tensor(128, 256)
    _, (mask, _), exact = drop_of(x, p)
    assert abs(exact - p) <= 2**-17
    n, dropped = mask.numel(), mask.double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean().item() - p) < 4 * deviation / n**0.5
    for axis, count in ((0, 128), (1, 256)):  # the means over rows and over columns scatter as independent draws do
        assert dropped.mean(axis).std().item() == pytest.approx(deviation / count**0.5, rel=0.25)
    centred = dropped - dropped.mean()
    for shifted in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(8, 1), centred.roll((1, 3), (0, 1))):
        assert abs((centred * shifted).mean().item()) / deviation**2 < 4 / n**0.5
    assert not torch.equal(mask, drop_of(x, p)[1][0])  # another seed, another mask


def test_the_mask_does_not_depend_on_the_tiles():
    """The same entries are dropped in all three kernels, whose tiles differ."""
    x = torch.ones(100, 200, dtype=DTYPES[0], device=DEVICE)
    drop, (mask, _), _ = drop_of(x, 0.4)
    rows, columns = (torch.eye(size, dtype=x.dtype, device=DEVICE) for size in x.shape)
    assert torch.equal(triton_low_rank.reduce(rows, x, drop) == 0, mask)
    assert torch.equal(triton_low_rank.project(x, columns, drop) == 0, mask)


def test_the_seed_comes_from_torchs_generator():
    x = tensor(8, 16)
    torch.manual_seed(3)
    first = triton_low_rank.draw_drop(x, 0.5)
    torch.manual_seed(3)
    second = triton_low_rank.draw_drop(x, 0.5)
    assert torch.equal(first[0][0], second[0][0])
    assert (first[0][1], first[1]) == (2**15, 0.5)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_entries_dropped_in_a_pass_of_their_own(make):
    x = make(70, 300, dtype=DTYPES[0])
    drop, mask, _ = drop_of(x, 0.3)
    assert torch.equal(triton_low_rank.dropped(x, drop), plain.zeroed(x, mask))


def test_copies_to_other_dtypes():
    """More tensors than one launch takes, of several sizes; one lies transposed, one target is a view."""
    sources = [tensor(5, 2000), tensor(3, 7).t(), tensor(1, 1), *(tensor(40, 3, seed=k) for k in range(4))]
    stacked = torch.empty(45, 3, dtype=torch.float16, device=DEVICE)
    dtypes = [torch.float16, torch.float32, torch.float16, torch.float32]
    targets = [torch.full(source.shape, float("nan"), dtype=dtype, device=DEVICE) for source, dtype in zip(sources, dtypes, strict=False)]
    targets += [stacked[:40], *(torch.empty(40, 3, device=DEVICE) for _ in range(2))]
    for kernels in (triton_low_rank, plain):
        stacked.fill_(-1)
        kernels.copy_all(targets, sources)
        assert all(torch.equal(target, source.to(target.dtype)) for target, source in zip(targets, sources, strict=True))
        assert (stacked[40:] == -1).all()
