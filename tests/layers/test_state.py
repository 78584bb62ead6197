"""All that an adapted layer knows beside its parameters is one object, which goes with the adapter and is copied with a copy."""

import copy
from dataclasses import replace

import torch
from torch import nn

from lightning_lora import LoRALinear, unload_lora
from lightning_lora.layers.adapting import shallow_copy
from tests.conftest import fill


def test_a_merged_layer_keeps_nothing_of_the_adapter_when_it_is_unloaded():
    plain = set(nn.Linear(4, 3).__dict__)
    layer = fill(LoRALinear(4, 3, rank=2))
    assert {name for name in layer.__dict__ if name not in plain} == {"lora_dropout", "lora_state"}
    layer.merge_weights()
    assert set(unload_lora(layer, merged="keep").__dict__) == plain


def test_a_copy_changes_without_the_original():
    layer = fill(LoRALinear(4, 3, rank=2, alpha=6))
    for other in (shallow_copy(layer), copy.deepcopy(layer)):
        other.lora_state.spec = replace(other.spec, rank=1)
        assert (layer.rank, layer.alpha, layer.lora_config.rank) == (2, 6.0, 2)
    other = copy.deepcopy(layer)
    other.merge_weights()
    assert other.merged and not layer.merged


def test_merging_again_after_an_unmerge_gives_the_same_bits():
    layer = fill(LoRALinear(8, 6, rank=2, dtype=torch.bfloat16))
    layer.merge_weights()
    merged, before = layer.weight.detach().clone(), layer.lora_state.copy()
    layer.unmerge_weights()
    assert not layer.merged and layer.merge_loss is None and before.merge.loss > 0
    layer.merge_again(before)
    assert torch.equal(layer.weight, merged) and layer.merge_loss == before.merge.loss
