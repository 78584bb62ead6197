"""What a layer is adapted with: options for variants, kinds by pattern; and that a kind may say its own rank to a file."""

import copy
import json
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, find_targets, load_adapter, merge_lora, save_adapter, unload_lora, unmerge_lora
from lightning_lora.layers.spec import LayerSpec, Option, options_of
from lightning_lora.registry import VARIANTS
from tests.conftest import TinyModel, as_bits, fill, snapshot
from tests.layers.fused_qkv import LoRAFusedQKV

FUSED = {"target_modules": ["qkv_proj", "out"], "kind_pattern": {"qkv_proj": "test_qkv"}, "rank": 2, "alpha": 6}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv_proj, self.out = nn.Linear(8, 12), nn.Linear(4, 8)

    def forward(self, x):
        q, k, v = self.qkv_proj(x).chunk(3, -1)
        return self.out(torch.tanh(q) * torch.tanh(k) + v)


def fused(make, **fields):
    return fill(apply_lora(make(Attention), LoRAConfig(**{**FUSED, **fields})))


X = torch.linspace(-1, 1, 24).view(3, 8)


def test_a_pattern_chooses_the_kind(make):
    report = find_targets(make(Attention), LoRAConfig(**FUSED))
    assert [issubclass(target.kind, LoRAFusedQKV) for target in report.targets] == [True, False]
    assert report.targets[0].spec == LayerSpec(LoRAConfig(**FUSED), 2, 6.0, "qkv_proj", "test_qkv")
    assert report.targets[0].parameters == 6 * 8 + 12 * 2
    layer = fused(make).qkv_proj
    assert isinstance(layer, LoRAFusedQKV) and layer.spec == report.targets[0].spec


def test_each_part_has_an_update_of_its_own(make):
    layer = fused(make).double().qkv_proj
    x = X.double()
    parts = [x @ A.t() @ B.t() for A, B in zip(layer.lora_A.chunk(3), layer.lora_B.chunk(3), strict=True)]
    expected = nn.functional.linear(x, layer.weight, layer.bias) + 3 * torch.cat(parts, -1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_the_kind(make, again):
    model = fused(make)
    other = again(model)
    assert type(other.qkv_proj) is type(model.qkv_proj) and other.qkv_proj.spec == model.qkv_proj.spec
    assert torch.equal(other(X), model(X))


def test_it_merges_and_goes(make):
    model = fused(make)
    expected, weight = model(X), as_bits(model.qkv_proj.weight)
    merge_lora(model)
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)
    unmerge_lora(model)
    assert torch.equal(as_bits(model.qkv_proj.weight), weight)
    assert type(unload_lora(model).qkv_proj) is nn.Linear and not any("lora" in name for name in model.qkv_proj.__dict__)


@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_the_file_says_the_rank_that_the_kind_says(make, tmp_path, variant):
    model = fused(make, variant=variant)
    save_adapter(model, tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == (6, 18)
    assert (fields["rank_pattern"], fields["alpha_pattern"]) == ({"^out": 2}, {"^out": 6})
    read = load_adapter(make(Attention), tmp_path / "adapter")
    assert type(read.out) is type(model.out) and not isinstance(read.qkv_proj, LoRAFusedQKV)
    torch.testing.assert_close(read(X), model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"qkv_proj": "qvk"}, "kind_pattern: kind='qvk' is not known; there are (?!.*_rows).*linear.*test_qkv"),
        ({"query": "test_qkv"}, "kind_pattern: 'query' matches no module"),
        ({"out": "test_qkv"}, r"'out' \(.*Linear\): its outputs cannot be shared out among 3 parts"),
    ],
)
def test_a_wrong_kind_changes_nothing(make, kinds, message):
    model = make(Attention)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        apply_lora(model, LoRAConfig(**{**FUSED, "kind_pattern": kinds}))
    assert snapshot(model) == before


class Optional:
    options: ClassVar = {"seed": Option(3, lambda value: isinstance(value, int), "a whole number")}


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("plain", {"seed": 1}, r"variant_options\['seed'\]=1 is not known to variant='plain'; it takes none\."),
        ("optional", {"sead": 1}, r"variant_options\['sead'\]=1 is not known to variant='optional'; it takes seed\."),
        ("optional", {"seed": "x"}, r"variant_options\['seed'\]='x': give a whole number\."),
    ],
)
def test_wrong_options_are_refused_by_name(make, monkeypatch, variant, options, message):
    monkeypatch.setitem(VARIANTS, "optional", Optional)
    model = make(TinyModel)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        apply_lora(model, LoRAConfig(variant=variant, variant_options=options))
    assert snapshot(model) == before


def test_options_have_defaults(monkeypatch):
    monkeypatch.setitem(VARIANTS, "optional", Optional)
    assert options_of(LoRAConfig(variant="optional")) == {"seed": 3}
    assert LayerSpec(LoRAConfig(variant="optional", variant_options={"seed": 5}), 1, 1.0).options == {"seed": 5}
