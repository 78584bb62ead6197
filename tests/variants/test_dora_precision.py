"""DoRA in fp32 where its formula subtracts or divides large numbers."""

import copy

import pytest
import torch
from torch import nn

from tests.conftest import adapted


@pytest.mark.parametrize("rows", [(9,), (3, 3)], ids=str)  # the layer's own sum, and the fused one
@pytest.mark.parametrize("what", ["large", "cancels"])
def test_float32_is_exact_to_its_digits_where_the_update_is_large_or_takes_the_weight_away(what, rows):
    """As after a step that was too long. The scale m/‖W + s·B·A‖ is far from 1 then, or its norm a small difference of large numbers."""
    torch.manual_seed(3)
    layer = adapted(nn.Sequential(nn.Linear(10, 20)), rank=8, alpha=16, target_modules=["0"], variant="dora")[0]
    with torch.no_grad():
        if what == "large":
            layer.lora_A.mul_(1e5)
            layer.lora_B.mul_(1e3)
        else:
            layer.weight.copy_(-layer.scaling * layer.lora_B @ layer.lora_A + 1e-2 * torch.randn(20, 10))
    x, exact = torch.randn(*rows, 10), copy.deepcopy(layer).double()
    expected, found = exact(x.double()), layer(x)
    # What is left in the second case is the rounding of W + s·B·A, as a merge would have it.
    tolerance = 2e-6 if what == "large" else 2e-3
    assert (found.double() - expected).norm() <= tolerance * expected.norm()
    norms = (exact.weight + exact.scaling * exact.lora_B @ exact.lora_A).norm(dim=1)
    assert ((layer.norm().double() - norms) / norms).abs().max() <= (1e-6 if what == "large" else 2e-5)
