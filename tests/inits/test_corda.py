"""CorDA, beside the decomposition of the weight times the covariance, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, initialize_from_data
from tests.inits.data import inputs, net, product, started


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_corda_takes_a_part_of_the_weight_by_the_covariance(name: str, mode: str) -> None:
    layer = started("corda", init_options={"mode": mode}).get_submodule(name)
    W = net().get_submodule(name).weight.detach()
    W = W.T if name == "b" else W
    C = sum((x / x.max()).T @ (x / x.max()) for x in inputs(name)) / 3
    C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    part = slice(0, 3) if mode == "ipm" else slice(len(S) - 3, len(S))
    torch.testing.assert_close(product(layer), (U[:, part] * S[part]) @ Vh[part] @ torch.linalg.inv(C), rtol=0, atol=1e-8)


def test_inputs_that_are_all_zero_take_the_largest_part_of_the_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 6)).double()
    U, S, Vh = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
    apply_lora(model, LoRAConfig(rank=3, target_modules=["0"], init="corda"))
    initialize_from_data(model, [torch.zeros(5, 8, dtype=torch.float64)])
    torch.testing.assert_close(product(model[0]), (U[:, :3] * S[:3]) @ Vh[:3], rtol=0, atol=1e-10)
