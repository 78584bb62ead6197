"""EVA, beside the principal components of all inputs at once, in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, initialize_from_data, load_adapter, lora_layers, save_adapter, unload_lora
from tests.inits.data import batches, inputs, started


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_eva_takes_the_principal_components_of_the_inputs(name: str) -> None:
    layer = started("eva", rank=8, init_options={"rho": 1.5}, target_modules=[name]).get_submodule(name)
    x = torch.cat(inputs(name))
    _, _, Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert layer.rank == 8 and not layer.lora_B.any()
    # From batch to batch only the 12 largest components are kept.
    assert ((layer.lora_A @ Vh[:8].T).abs().detach().diagonal() > 0.98).all()
    torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-9)


def test_eva_gives_ranks_by_explained_variance() -> None:
    """The largest shares of all layers win, and the scaling stays."""
    model = started("eva", rank=6)
    shares = []
    for name in "abc":
        x = torch.cat(inputs(name))
        S = torch.linalg.svdvals(x - x.mean(0)).square()
        shares += [(-float(share), name) for share in (S / S.sum())[:12]]
    won = [name for _, name in sorted(shares)[: 3 * 6]]
    ranks = {name: layer.rank for name, layer in lora_layers(model)}
    assert ranks == {name: won.count(name) for name in "abc"} and len({*ranks.values()}) > 1
    assert {layer.scaling for _, layer in lora_layers(model)} == {1.0}
    config = model.a.lora_config
    assert config.rank_pattern == ranks and config.alpha_pattern == {name: float(rank) for name, rank in ranks.items()}
    assert (
        {layer.lora_config for _, layer in lora_layers(model)}
        if False
        else all(layer.lora_config == config for _, layer in lora_layers(model))
    )


def test_whitened_components() -> None:
    plain, whitened = (started("eva", init_options={"rho": 1, "whiten": white}).a for white in (False, True))
    x = torch.cat(inputs("a"))
    sizes = (whitened.lora_A.norm(dim=1) / plain.lora_A.norm(dim=1)).detach() ** -2
    torch.testing.assert_close(sizes, torch.linalg.svdvals(x - x.mean(0))[:3], rtol=0.1, atol=0)


def test_a_layer_without_a_rank_has_no_adapter(tmp_path: Path) -> None:
    """The inputs of one layer vary in two directions, those of the other in sixteen."""
    inner = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)).double()
    with torch.no_grad():
        inner[0].weight.copy_(torch.diag(torch.tensor([1.0] * 2 + [0.0] * 14)))
    holder = nn.ModuleDict({"inner": inner})
    config = LoRAConfig(rank=1, init="eva", target_modules=["0", "1"], modules_to_save=[])
    initialize_from_data(apply_lora(holder, config), batches(), step=lambda holder, x: holder["inner"](x))
    assert {name: layer.rank for name, layer in lora_layers(holder)} == {"inner.1": 2} and type(inner[0]) is nn.Linear
    assert apply_lora(holder, config) is holder  # what the data decided is what the config means
    save_adapter(holder, tmp_path)
    bare = nn.ModuleDict({"inner": copy.deepcopy(inner)})
    unload_lora(bare)
    assert [name for name, _ in lora_layers(load_adapter(bare, tmp_path))] == ["inner.1"]
