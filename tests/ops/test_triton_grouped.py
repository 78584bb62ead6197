"""The grouped kernel against each group's product in float64: every division of the rows, size, rank and layout."""

import pytest
import torch

pytest.importorskip("triton")

from lightning_lora.ops import triton_grouped
from tests.ops.operands import DEVICE, DTYPES, TOLERANCE, error, strided, tensor

# where each group's rows end
DIVISIONS = {
    "one": [70],
    "uneven": [3, 3, 67, 131, 200],
    "none but the last": [0, 0, 0, 64],
    "rows after the last": [5, 40],
    "many": [*range(0, 198 if DEVICE == "cuda" else 27, 3)],  # without a GPU the interpreter takes 30 ms a group
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("cols", "rank"), [(48, 5), (136, 16), (300, 40), (24, 100)])
@pytest.mark.parametrize("ends", DIVISIONS.values(), ids=DIVISIONS)
def test_adds_each_groups_product(ends, cols, rank, transposed, dtype):
    rows, groups = max(ends[-1], 50), len(ends)
    y, t = strided(rows, cols, dtype=dtype), strided(rows, rank, dtype=dtype)
    B = tensor(groups, rank, cols, dtype=dtype).mT if transposed else tensor(groups, cols, rank, dtype=dtype)
    exact, start = y.double(), 0
    for g, end in enumerate(ends):
        exact[start:end] += t[start:end].double() @ B[g].double().T
        start = end
    rest = y[start:].clone()
    offsets = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    assert triton_grouped.add_(y, t, B, offsets) is y and error(y, exact) < TOLERANCE[dtype]
    assert torch.equal(y[start:], rest)
