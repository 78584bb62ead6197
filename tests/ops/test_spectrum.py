"""Singular values from Gram matrices, and the ranks they say, against the dense product in float64."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_lora.ops.spectrum import effective_rank, gram_matrices, singular_values, stable_rank


def made(out: int, rank: int, inputs: int, *batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    A, B = (torch.randn(*batch, *shape, generator=generator, dtype=torch.float64) for shape in ((rank, inputs), (out, rank)))
    return A, B


def spectrum(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return singular_values(*gram_matrices(A, B))


@pytest.mark.parametrize("sizes", [(20, 4, 30), (3, 5, 30), (20, 6, 2), (20, 1, 30)], ids=str)
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_singular_values_are_those_of_the_dense_product(sizes: tuple[int, int, int], batch: tuple[int, ...]) -> None:
    """A rank above the sizes of the product too: the values that it cannot have are zero."""
    A, B = made(*sizes, *batch)
    wanted = torch.linalg.svdvals(B @ A)[..., : sizes[1]]
    found = spectrum(A, B)
    torch.testing.assert_close(found[..., : wanted.shape[-1]], wanted, rtol=1e-6, atol=1e-6 * float(wanted.max()))
    assert found.shape[-1] == sizes[1] and (found[..., wanted.shape[-1] :] < 1e-6 * wanted.max()).all()


def test_factors_of_unlike_sizes_lose_nothing() -> None:
    """Pairs of very different norms, a small change beside a large start, and a dependent row."""
    A, B = made(20, 4, 30)
    size = torch.tensor([1e6, 1.0, 1e-5, 1.0], dtype=torch.float64)
    small = torch.cat((A * size[:, None], A * 1e-4)), torch.cat((B / size, B[:, :4]), 1)
    for a, b in ((A * size[:, None], B / size), small, (A[[0, 1, 2, 2]], B)):
        wanted = torch.linalg.svdvals(b @ a)[: len(a)]
        torch.testing.assert_close(spectrum(a, b), wanted, rtol=1e-6, atol=1e-6 * float(wanted[0]))


def test_a_start_without_update_is_zero_and_what_is_not_finite_is_nan() -> None:
    A, B = made(20, 4, 30, 3)
    B[0] = 0.0
    B[1, 0, 0] = math.nan
    found = spectrum(A, B)
    assert not found[0].any() and found[1].isnan().all() and found[2].isfinite().all()
    assert stable_rank(found[0]) == effective_rank(found[0]) == 0


@pytest.mark.parametrize(
    ("values", "stable", "effective"), [([2.0, 2.0, 2.0], 3, 3), ([5.0, 0.0, 0.0], 1, 1), ([2.0, 1.0], 1.25, 1.8898815748)]
)
def test_ranks_are_their_formulas(values: list[float], stable: float, effective: float) -> None:
    S = torch.tensor(values, dtype=torch.float64)
    assert float(stable_rank(S)) == pytest.approx(stable) and float(effective_rank(S)) == pytest.approx(effective)


def test_flops_are_counted() -> None:
    """2·r²·(in + out) for the Gram matrices: at 4096 × 4096 and r = 16, a millionth of a step's 4·in·out·tokens at 8,192 tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    A, B = made(64, 4, 32)
    with FlopCounterMode(display=False) as counter:
        gram_matrices(A, B)
    assert counter.get_total_flops() == 2 * 4**2 * (64 + 32)
