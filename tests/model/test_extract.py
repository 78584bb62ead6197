"""The difference of two models as an adapter: the best one of its rank, and exact where the rank allows."""

import copy

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, extract_adapter, load_adapter, merge_lora, quantize_base, save_adapter
from lightning_lora.layers import lora_layers
from tests.conftest import TinyModel
from tests.parity.models import base, logits

ALL = LoRAConfig(target_modules="all-linear", rank=3)


def tuned_by(model, rank, names=("proj", "fc", "up", "down", "q", "v"), seed=0):
    """A copy with an update of this rank on each matrix whose name has one of these parts."""
    tuned = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.ndim > 1 and any(part in name for part in names):
                rows, columns = parameter.flatten(1).shape
                parameter += (torch.randn(rows, rank) @ torch.randn(rank, columns) * 0.05).view(parameter.shape)
    return tuned


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_low_rank_difference_comes_out_whole(name, tmp_path):
    model = base(name)
    tuned = tuned_by(model, 3, ("proj", "c_attn", "c_fc"))
    adapted = extract_adapter(base(name), tuned, ALL)
    torch.testing.assert_close(logits(adapted.eval(), name), logits(tuned.eval(), name), rtol=1e-4, atol=1e-4)
    folder = save_adapter(adapted, tmp_path / "adapter")
    torch.testing.assert_close(logits(load_adapter(base(name), folder).eval(), name), logits(tuned.eval(), name), rtol=1e-4, atol=1e-4)


def test_the_best_approximation_of_a_rank():
    model = base("llama")
    tuned = tuned_by(model, 8)
    for name, layer in lora_layers(extract_adapter(base("llama"), tuned, ALL)):
        wanted = tuned.get_submodule(name).weight.double() - model.get_submodule(name).weight.double()
        S = torch.linalg.svdvals(wanted)
        torch.testing.assert_close((layer.merge_delta() - wanted).norm(), S[3:].norm(), rtol=1e-4, atol=1e-6, check_dtype=False)


def test_a_share_of_the_energy_gives_each_layer_its_rank():
    model = base("llama")
    tuned = tuned_by(tuned_by(model, 1, ("q_proj",)), 5, ("v_proj",))
    config = LoRAConfig(target_modules=["q_proj", "v_proj"], scaling="rslora", rank=8)
    ranks = {name: layer.rank for name, layer in lora_layers(extract_adapter(base("llama"), tuned, config, energy=1 - 1e-9))}
    assert {rank for name, rank in ranks.items() if "q_proj" in name} == {1}
    assert {rank for name, rank in ranks.items() if "v_proj" in name} == {5}


def test_convolutions_and_embeddings():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.tokens = nn.Embedding(7, 12)
            self.conv = nn.Conv1d(12, 5, 3)

        def forward(self, ids):
            return self.conv(self.tokens(ids).mT)

    ids = torch.arange(14).view(2, 7) % 7
    tuned = tuned_by(Net(), 2, ("tokens", "conv"))
    adapted = extract_adapter(Net(), tuned, LoRAConfig(target_modules=["tokens", "conv"], rank=2))
    torch.testing.assert_close(adapted(ids), tuned(ids), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merge_lora(adapted)(ids), tuned(ids), rtol=1e-4, atol=1e-5)


def test_a_rank_above_the_matrix_is_padded():
    model = nn.Sequential(nn.Linear(3, 2))
    tuned = tuned_by(model, 2, ("0",))
    with pytest.warns(UserWarning, match="is above min"):
        adapted = extract_adapter(copy.deepcopy(model), tuned, LoRAConfig(target_modules=["0"], rank=4))
    x = torch.eye(3)
    torch.testing.assert_close(adapted(x), tuned(x))


def test_what_is_trained_in_full_takes_the_tuned_values():
    model = base("llama")
    tuned = tuned_by(model, 2, ("q_proj", "lm_head"))
    config = LoRAConfig(target_modules=["q_proj"], rank=2, modules_to_save=["lm_head"])
    adapted = extract_adapter(base("llama"), tuned, config)
    torch.testing.assert_close(logits(adapted.eval(), "llama"), logits(tuned.eval(), "llama"), rtol=1e-4, atol=1e-4)


def test_other_differences_are_told():
    model = base("llama")
    with pytest.warns(UserWarning, match=r"down_proj.weight' and 1 more parameters differ"):
        extract_adapter(base("llama"), tuned_by(model, 1, ("q_proj", "down_proj")), LoRAConfig(target_modules=["q_proj"]))


def test_what_is_refused_changes_nothing():
    model, tuned = base("llama"), base("llama")
    state = copy.deepcopy(model.state_dict())

    def refused(match, *args, **options):
        with pytest.raises(ValueError, match=match):
            extract_adapter(*args, **options)

    refused("energy=0", model, tuned, ALL, energy=0)
    refused("energy=True", model, tuned, ALL, energy=True)
    refused("variant='dora'", model, tuned, LoRAConfig(variant="dora"))
    refused("init='pissa': .* leave init out", model, tuned, LoRAConfig(init="pissa"))
    refused("tuned: .* has LoRA", model, apply_lora(base("llama"), ALL), ALL)
    refused("model: .* has LoRA", apply_lora(base("llama"), ALL), tuned, ALL)
    refused("not one architecture", model, TinyModel(), ALL)
    broken = copy.deepcopy(tuned)
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    refused(r"tuned: the weight of 'model\.layers\.1\.mlp\.up_proj' has NaN", model, broken, ALL)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    refused("grouped convolution", grouped, copy.deepcopy(grouped), LoRAConfig(target_modules=["0"], rank=2))
    assert not any(lora_layers(model)) and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_quantized_models_are_refused():
    model = quantize_base(base("llama"), "fp8")
    with pytest.raises(ValueError, match="is quantized"):
        extract_adapter(model, base("llama"), ALL)
