"""A bias on B: merged into the layer's own, restored exactly, and part of what identifies a base. The formula is in ``make family``;
PEFT's outputs, gradients, merges and files in tests/parity/test_peft_custom_models.py."""

import copy

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    apply_lora,
    export_merged,
    load_adapter,
    merge_lora,
    save_adapter,
    unload_lora,
    unmerge_lora,
)
from lightning_lora.adapter_io.fingerprint import base_identity
from tests.conftest import fill
from tests.lit import LitNet, trainer
from tests.parity.models import llama

IDS = torch.tensor([[5, 3, 9, 1]])


def config(**fields):
    return LoRAConfig(**{"rank": 2, "variant": "lora_bias", "target_modules": ["q_proj", "o_proj"], **fields})


def model(**fields):
    torch.manual_seed(0)
    return llama(attention_bias=True, **fields).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bias_and_weight_come_back_bit_for_bit_and_the_base_stays_the_same(dtype, tmp_path):
    base = model().to(dtype)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    plain = copy.deepcopy(base.state_dict())
    adapted = fill(apply_lora(base, config()))
    identity = base_identity(adapted)
    wanted = adapted(IDS).logits
    merge_lora(adapted)
    assert not torch.equal(adapted.model.layers[0].self_attn.q_proj.bias, plain["model.layers.0.self_attn.q_proj.bias"])
    torch.testing.assert_close(
        adapted(IDS).logits, wanted, **({"rtol": 0, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.1})
    )
    assert base_identity(adapted) == identity
    save_adapter(adapted, tmp_path)
    unmerge_lora(adapted)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in adapted.state_dict().items() if "lora_" not in name)
    assert torch.equal(adapted(IDS).logits, wanted)
    other = model().to(dtype)
    other.load_state_dict(plain)
    assert torch.equal(load_adapter(other, tmp_path)(IDS).logits, wanted)


def test_an_exported_model_has_the_bias(tmp_path):
    adapted = fill(apply_lora(model(), config()))
    wanted = adapted(IDS).logits
    export_merged(adapted, tmp_path)
    torch.testing.assert_close(type(adapted).from_pretrained(tmp_path).eval()(IDS).logits, wanted)


def test_a_layer_without_a_bias_is_not_merged_or_exported(tmp_path):
    adapted = fill(apply_lora(llama(), config()))
    before = copy.deepcopy(adapted.state_dict())
    for do in (merge_lora, lambda model: export_merged(model, tmp_path)):
        with pytest.raises(ValueError, match=r"q_proj'.*its adapter has a bias \(variant='lora_bias'\) and the layer has none"):
            do(adapted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())


@pytest.mark.parametrize(
    ("make", "fields", "reason"),
    [
        (lambda: nn.Sequential(nn.Embedding(4, 4)), {"target_modules": ["0"]}, "no layer with one weight and a bias"),
        (lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), {"target_modules": ["0"]}, "no layer with one weight and a bias"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {"target_modules": ["0"], "init": "pissa"}, "no init='pissa' beside a bias"),
    ],
    ids=["embedding", "attention", "init"],
)
def test_what_peft_refuses_is_refused_by_name(make, fields, reason):
    net = make()
    with pytest.raises(ValueError, match=reason):
        apply_lora(net, config(**fields))
    assert all(p.requires_grad for p in net.parameters())


def test_merged_and_kept_it_is_the_plain_models_bias():
    adapted = fill(apply_lora(model(), config()))
    wanted = adapted(IDS).logits
    plain = unload_lora(merge_lora(adapted), merged="keep")
    torch.testing.assert_close(plain(IDS).logits, wanted)


def test_the_base_that_is_loaded_once_more_leaves_a_merged_bias():
    """As Lightning's ``setup`` may do: the weight stays merged, and so does the bias beside it."""
    base = copy.deepcopy(model().state_dict())
    adapted = fill(apply_lora(model(), config()))
    wanted = merge_lora(adapted)(IDS).logits
    for layer in adapted.modules():
        if hasattr(layer, "lora_state"):
            layer.lora_base_again = True
    adapted.load_state_dict(base)
    assert torch.equal(adapted(IDS).logits, wanted)


def test_a_merge_that_cannot_be_is_refused_before_training(tmp_path):
    net = LitNet()
    net.net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2))
    lora = LoRAConfig(rank=2, variant="lora_bias", target_modules=["0", "1"], modules_to_save=[])
    with pytest.raises(ValueError, match=r"'net.0' cannot be merged at the end of fit: .*merge_on_fit_end=False"):
        trainer(tmp_path, LoRACallback(lora), max_epochs=1).fit(net)
    assert type(net.net[0]) is nn.Linear
