"""LoRA-GA, beside the singular vectors of the weight's gradient, in float64."""

from __future__ import annotations

import pytest
import torch

from tests.inits.data import batches, loss, net, started


@pytest.mark.parametrize("checkpointed", [None, False, True])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_lora_ga_takes_singular_vectors_of_the_weights_gradient(name: str, checkpointed: bool | None) -> None:
    layer = started("lora_ga", net(checkpointed=checkpointed), init_options={"gamma": 4}).get_submodule(name)
    plain = net().eval()
    (sum(loss(plain, x) for x in batches()) / 3).backward()
    G = plain.get_submodule(name).weight.grad
    G = G.T if name == "b" else G
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    scale = G.shape[0] ** 0.25 / 2
    for mine, wanted in ((layer.lora_A.detach().T, Vh[:3].T * scale), (layer.lora_B.detach(), U[:, 3:6] * scale)):
        torch.testing.assert_close(mine * (mine * wanted).sum(0).sign(), wanted, rtol=0, atol=1e-8)
