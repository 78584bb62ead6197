"""Sizes and spectra of updates, for every kind, variant and init at hand, against dense updates in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, lora_layers, quantize_base
from lightning_lora.model.layer_statistics import gradient_norms, low_rank_layers, spectra, weight_norms
from lightning_lora.model.rank_advice import advise_ranks, patterns, wanted_rank, within_budget
from tests.layers.experts import tiny_qwen3_moe
from tests.layers.test_slices import made as made_slices


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.embed = nn.Linear(12, 10), nn.Embedding(11, 12)
        self.conv, self.grouped = nn.Conv2d(4, 8, 3), nn.Conv1d(8, 12, 3, groups=2)


def adapted(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    model = apply_lora(Kinds().double(), LoRAConfig(**{"rank": 4, "alpha": 6, "target_modules": ["linear"], **fields}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.rpartition(".")[2].startswith("lora_") and not name.endswith("0"):
                p.add_(torch.randn_like(p) * 0.1)
    return model


EVERY_KIND = ["linear", "embed", "conv", "grouped"]
CASES = [
    {"target_modules": EVERY_KIND},
    {"init": "pissa"},
    {"init": "olora"},
    {"variant": "vera"},
    {"variant": "lora_xs"},
    {"variant": "adalora"},
    {"variant": "lora_bias"},
]


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_update_is_that_of_the_dense_one(fields: dict[str, Any]) -> None:
    if fields.get("variant") == "vera":
        fields = {**fields, "alpha": LoRAConfig().alpha}
    model = adapted(**fields)
    layers = low_rank_layers(model)
    for name, found in spectra(layers).items():
        dense = layers[name].to_matrix(layers[name].lora_delta().detach())
        assert found.norm == pytest.approx(float(dense.norm()), rel=1e-6)
        wanted = torch.linalg.svdvals(dense)
        wanted = (wanted.square().mean(0).sqrt() if wanted.ndim > 1 else wanted)[: len(found.values)]
        torch.testing.assert_close(found.values[: len(wanted)], wanted, rtol=1e-5, atol=1e-6 * float(wanted[0]))
        assert 1 <= found.stable_rank <= found.effective_rank * (1 + 1e-9) <= len(found.values) * (1 + 1e-6)


def test_dora_measures_the_product_without_its_magnitude() -> None:
    layers = low_rank_layers(adapted(variant="dora"))
    dense = layers["linear"].merge_delta().detach()
    assert spectra(layers)["linear"].norm == pytest.approx(float(dense.norm()), rel=1e-6)


def pad(values: torch.Tensor, size: int) -> torch.Tensor:
    return nn.functional.pad(values, (0, size - len(values)))


def test_slices_are_measured_one_by_one() -> None:
    """Two slices of rank 3 are two products, not one of rank 6."""
    _, layer = made_slices()
    A, B = layer.lora_A.detach().view(2, 3, 6), layer.lora_B.detach().split(layer.spec.slices.sizes)
    each = torch.stack([pad(torch.linalg.svdvals(layer.scaling * b @ a)[:3], 3) for a, b in zip(A, B, strict=True)])
    found = spectra({"qkv": layer})["qkv"]
    torch.testing.assert_close(found.values, each.square().mean(0).sqrt(), rtol=1e-5, atol=1e-6)
    assert found.norm == pytest.approx(float(layer.lora_delta().detach().norm()), rel=1e-6)


def test_experts_are_measured_weight_by_weight() -> None:
    model = apply_lora(tiny_qwen3_moe(), LoRAConfig(rank=2, target_modules=["experts"]))
    with torch.no_grad():
        for p in get_lora_parameters(model):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    layers = low_rank_layers(model)
    assert {name.rpartition(".")[2] for name in layers} == {"gate_up_proj", "down_proj"}
    for name, found in spectra(layers).items():
        assert found.norm == pytest.approx(float(layers[name].lora_delta().detach().norm()), rel=1e-5)
    values = {name: found.values for name, found in spectra(layers).items()}
    assert set(advise_ranks(model, values, 0.99).values()) == {4}, "each module has one rank for all of its weights"


def test_a_quantized_weight_is_read_unpacked() -> None:
    model = quantize_base(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), "fp8", modules_to_save=[])
    layers = low_rank_layers(apply_lora(model, LoRAConfig(rank=2, target_modules=["0"])))
    assert weight_norms(layers)["0"] == pytest.approx(float(layers["0"].base_weight().double().norm()))


def test_weights_and_gradients_have_their_norms() -> None:
    model = adapted(target_modules=["linear", "conv"])
    layers: dict[str, Any] = low_rank_layers(model)
    assert weight_norms(layers) == pytest.approx({name: float(layer.weight.norm()) for name, layer in layers.items()})
    layers["linear"](torch.randn(3, 12, dtype=torch.float64)).square().sum().backward()
    found, A, B = gradient_norms(layers, 0.5), layers["linear"].lora_A.grad, layers["linear"].lora_B.grad
    assert found["linear"] == pytest.approx(
        tuple(0.5 * float(n) for n in (A.norm(), B.norm(), torch.cat((A.flatten(), B.flatten())).norm()))
    )
    assert all(math.isnan(value) for value in found["conv"])


@pytest.mark.parametrize(
    ("values", "rank", "wanted"),
    [([1.0, 1e-3, 0, 0], 4, 1), ([1.0, 1.0, 0, 0], 4, 2), ([1.0] * 4, 4, 8), ([1.0] * 6 + [0, 0], 4, 3), ([0.0] * 4, 4, None)],
)
def test_a_spectrum_suggests_a_rank(values: list[float], rank: int, wanted: int | None) -> None:
    """Eight values at rank 4 are those of an adapter that keeps its start."""
    assert wanted_rank(torch.tensor(values), rank, 0.99) == wanted
    assert wanted_rank(torch.tensor([math.nan, 1.0]), 2, 0.99) is None


def test_suggested_ranks_are_a_config_that_keeps_scalings() -> None:
    model = adapted(target_modules=EVERY_KIND)
    found = {"linear": torch.tensor([1.0, 0, 0, 0]), "grouped": torch.tensor([1.0, 0.0])}
    ranks = advise_ranks(model, found, 0.99)
    assert ranks == {"linear": 1, "grouped": 2}, "the groups share the rank evenly"
    again = apply_lora(Kinds(), LoRAConfig(rank=4, alpha=6, target_modules=EVERY_KIND, **patterns(model, ranks)))  # type: ignore[arg-type]
    layers = dict(lora_layers(again))
    assert {name: layer.rank for name, layer in layers.items()} == {"linear": 1, "embed": 4, "conv": 4, "grouped": 2}
    assert all(layer.scaling == pytest.approx(1.5) for layer in layers.values())


def test_a_variant_with_one_rank_for_all_gets_no_suggestion() -> None:
    model = adapted(variant="vera", alpha=LoRAConfig().alpha)
    assert advise_ranks(model, {"linear": torch.tensor([1.0, 0, 0, 0])}, 0.99) == {}
    assert patterns(model, {}) == {"rank_pattern": {}, "alpha_pattern": {}}


def test_no_rank_above_the_smaller_side_is_suggested() -> None:
    """Where an update uses every direction that its matrix has, twice the rank would add nothing."""
    model = apply_lora(
        nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 12), nn.Conv1d(8, 12, 1, groups=2)), LoRAConfig(rank=4, target_modules=[".*"])
    )
    full = {name: torch.ones(2 if name == "2" else 4) for name in "012"}
    assert advise_ranks(model, full, 0.99) == {"0": 5, "1": 5, "2": 8}  # two groups with an A of (4, 4) each


def budgeted(budget: float, **spectra_of: list[float]) -> dict[str, int]:
    widths = {"a": 8, "b": 8, "c": 16}
    model = nn.ModuleDict({name: nn.Linear(width, width) for name, width in widths.items()})
    apply_lora(model, LoRAConfig(rank=4, target_modules=list(widths)))
    values = {name: torch.tensor(each) for name, each in spectra_of.items()}
    return within_budget(model, values, advise_ranks(model, values, 0.999), budget)


def test_a_budget_goes_to_the_directions_that_hold_most() -> None:
    small, flat = [1.0, 0.0, 0.0, 0.0], [1.0] * 4
    assert budgeted(1.0, a=small, b=flat, c=flat) == {"a": 1, "b": 7, "c": 4}, (
        "what a gives up goes to b, where a rank costs less than in c"
    )
    assert budgeted(0.25, a=flat, b=flat, c=[1.0, 0.1, 0.1, 0.1]) == {"a": 1, "b": 1, "c": 1}
    assert budgeted(1.0, a=small, b=small) == {"a": 1, "b": 1}, "c has no suggestion and keeps its rank"
    with pytest.raises(ValueError, match=r"rank_budget=0\.2: even the lowest ranks"):
        budgeted(0.2, a=flat, b=flat, c=flat)
