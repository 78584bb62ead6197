"""Whatever is made in inference mode trains afterwards."""

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, merge_lora, quantize_base, shrink_adalora, unmerge_lora
from lightning_lora.utils.parameters import make_parameter
from tests.conftest import fill


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_parameter_is_a_copy_only_of_an_inference_tensor(requires_grad):
    with torch.inference_mode():
        value = torch.ones(2)
        made = make_parameter(value, requires_grad)
    assert not made.is_inference() and made.requires_grad is requires_grad and torch.equal(made, value)
    plain = torch.ones(2)
    assert make_parameter(plain, requires_grad).data_ptr() == plain.data_ptr()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


def trains(model):
    model.requires_grad_(True)(torch.tensor([1, 2])).sum().backward()
    return all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("variant", ["plain", "dora", "vera", "adalora"])
def test_a_model_adapted_in_inference_mode_trains(variant):
    model = Tied()
    with torch.inference_mode():
        apply_lora(model, LoRAConfig(rank=2, target_modules=["head"], modules_to_save=[], variant=variant))
    assert trains(model)


def test_a_tied_weight_that_was_merged_in_inference_mode_trains():
    model = fill(apply_lora(Tied(), LoRAConfig(rank=2, target_modules=["head"], modules_to_save=[])))
    with torch.inference_mode():
        merge_lora(model, untie=True)
    model.requires_grad_(True)(torch.tensor([1, 2])).sum().backward()
    assert model.head.weight is not model.embed.weight and model.head.weight.grad.any() and model.embed.weight.grad.any()
    with torch.inference_mode():
        unmerge_lora(model)
    assert model.head.weight is model.embed.weight and trains(model)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_packed_weight_that_was_merged_in_inference_mode_passes_gradients_on(how):
    model = quantize_base(nn.Sequential(nn.Linear(64, 64)), how)
    fill(apply_lora(model, LoRAConfig(rank=2, target_modules=["0"])))
    with torch.inference_mode():
        merge_lora(model, quantized="dequantize")
    x = torch.randn(4, 64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.any()


def test_an_adapter_that_shrank_in_inference_mode_trains():
    model = fill(apply_lora(Tied(), LoRAConfig(rank=4, target_modules=["head"], modules_to_save=[], variant="adalora")))
    with torch.inference_mode():
        shrink_adalora(model)
    assert trains(model)
