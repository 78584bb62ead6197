"""The best directions of a product, against the singular value decomposition of the dense matrix."""

from __future__ import annotations

import pytest
import torch

from lightning_lora.ops.other_rank import best_directions


@pytest.mark.parametrize(("r", "inputs", "outputs", "rank"), [(4, 9, 7, 2), (4, 9, 7, 4), (6, 3, 8, 2), (6, 8, 3, 5), (1, 5, 5, 1)])
def test_maps_give_the_best_approximation(r: int, inputs: int, outputs: int, rank: int) -> None:
    A, B = torch.randn(3, r, inputs, dtype=torch.float64), torch.randn(3, outputs, r, dtype=torch.float64)
    T, S = best_directions(A, B, rank)
    kept = min(rank, inputs, outputs, r)
    assert T.shape == (3, kept, r) and S.shape == (3, r, kept)
    U, sigma, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    best = U[..., :kept] * sigma[..., None, :kept] @ Vh[..., :kept, :]
    torch.testing.assert_close((B @ S) @ (T @ A), best, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(T @ S, torch.eye(kept, dtype=torch.float64).expand(3, -1, -1), rtol=0, atol=1e-9)
    rows = T @ A
    length = A.square().sum((-2, -1)) / r
    torch.testing.assert_close(rows @ rows.mT, length[:, None, None] * torch.eye(kept, dtype=torch.float64), rtol=0, atol=1e-9)


def test_factors_that_have_fewer_directions_than_their_rank() -> None:
    A, B = torch.randn(4, 9, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    for spoil in (lambda: A[2].zero_(), lambda: A[1].copy_(A[0]), lambda: B.zero_(), lambda: A.zero_()):
        spoil()
        before = B @ A
        T, S = best_directions(A, B, 3)
        assert T.isfinite().all() and S.isfinite().all()
        torch.testing.assert_close((B @ S) @ (T @ A), before, rtol=1e-9, atol=1e-11)


def test_factors_without_a_rotation_are_only_scaled() -> None:
    """Rows of A that are orthogonal and equally long, and columns of B that are orthogonal: T is a signed permutation."""
    A = 3 * torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64)).Q.t()
    B = torch.linalg.qr(torch.randn(7, 4, dtype=torch.float64)).Q * torch.tensor([1.0, 4.0, 2.0, 3.0])
    T, S = best_directions(A, B, 4)
    order = torch.eye(4, dtype=torch.float64)[[1, 3, 2, 0]]
    torch.testing.assert_close(T.abs(), order)
    torch.testing.assert_close(S.abs(), order.t())
