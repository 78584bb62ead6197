"""Factors taken apart into directions and put together again, for every way that kinds divide them."""

from __future__ import annotations

import pytest
import torch

from lightning_lora.layers.directions import Directions

#: rows of B, products in A, shape of A and of B at rank 4
CASES = {
    "one": ((7,), 1, (4, 5), (7, 4)),
    "groups": ((3, 3), 2, (8, 5, 2), (6, 4, 1)),
    "slices": ((4, 2), 2, (8, 5), (6, 4)),
    "shared A": ((3, 3), 1, (4, 5), (6, 4)),
    "shared B": ((7,), 3, (12, 5), (7, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_pairs_are_the_products(name: str) -> None:
    rows, products, A_shape, B_shape = CASES[name]
    divided = Directions(rows, products)
    A, B = torch.randn(A_shape, dtype=torch.float64), torch.randn(B_shape, dtype=torch.float64)
    of_A, of_B = divided.of_A(A), divided.of_B(B)
    assert torch.equal(divided.to_A(of_A, A_shape), A) and torch.equal(divided.to_B(of_B, B_shape), B)
    assert [len(a) for a in of_A] == [len(b) for b in of_B] and all(block.shape[1] == 4 for block in (*of_A, *of_B))
    As, Bs = A.flatten(1).split(4), B.flatten(1).split(list(rows))
    wanted = [Bs[min(k, len(Bs) - 1)] @ As[min(k, len(As) - 1)] for k in range(max(len(As), len(Bs)))]
    found = [b.mT @ a for a, b in zip(of_A, of_B, strict=True)]
    flat = torch.cat([each.flatten() for pair in found for each in pair])
    joined = torch.cat(wanted, 1) if name == "shared B" else torch.cat([each.flatten() for each in wanted])
    torch.testing.assert_close(flat, joined.flatten())
