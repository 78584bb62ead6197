"""Layers that compute their weight at each call: ``all-linear`` passes over them and says why, a config that names one is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from lightning_lora import LoRAConfig, apply_lora, find_targets, lora_layers, merge_lora


def pruned(layer: nn.Linear) -> nn.Linear:
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.parametrize(
    "change", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal, spectral_norm, pruned]
)
def test_computed_weights(change: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 4), change(nn.Linear(4, 4))).eval()
    with pytest.raises(ValueError, match=r"'2' \(.*Linear\) computes its weight anew at each call"):
        apply_lora(model, LoRAConfig(rank=2, target_modules=["2"]))
    config = LoRAConfig(rank=2, target_modules="all-linear")
    assert find_targets(model, config).passed_over["2"].startswith("it computes its weight anew at each call")
    apply_lora(model, config)
    assert [name for name, _ in lora_layers(model)] == ["0", "1"]
    model[0].lora_B.data.fill_(0.3)
    x = torch.ones(2, 4)
    output = model(x)
    torch.testing.assert_close(merge_lora(model)(x), output)


def test_complex_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 32))
    with pytest.raises(ValueError, match=r"'0' .* stores its weight as torch\.complex64"):
        apply_lora(model, LoRAConfig(rank=2, target_modules=["0"]))
    assert find_targets(model, LoRAConfig(rank=2, target_modules="all-linear")).passed_over == {"0": "its weight is complex"}
