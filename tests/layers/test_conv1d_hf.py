"""Hugging Face's Conv1D (GPT-2): a linear stored the other way round."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, apply_lora, find_targets, merge_lora, unload_lora, unmerge_lora
from lightning_lora.layers.conv1d_hf import LoRAConv1DHF
from tests.conftest import adapted, same_bits
from tests.layers.kinds import CASES


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)).eval()


def test_shapes():
    layer = CASES["hf-conv1d"].layer()
    assert layer.weight.shape == (12, 10)
    assert layer.lora_A.shape == (4, 12)
    assert layer.lora_B.shape == (10, 4)
    assert layer.lora_delta().shape == (12, 10)
    assert layer.transposed
    assert layer.is_linear


def test_it_is_a_linear_with_the_weight_transposed():
    layer = CASES["hf-conv1d"].layer()
    linear = torch.nn.Linear(12, 10)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.t())
        linear.bias.copy_(layer.bias)
    model = torch.nn.Sequential(linear)
    apply_lora(model, config=LoRAConfig(target_modules=["0"], rank=4))
    with torch.no_grad():
        linear.lora_A.copy_(layer.lora_A)
        linear.lora_B.copy_(layer.lora_B)
    x = CASES["hf-conv1d"].x()
    torch.testing.assert_close(layer(x), linear(x))


def test_gpt2_from_apply_to_unload():
    model, ids = adapted(gpt2(), target_modules=["c_attn", "c_fc"], rank=2), torch.tensor([[1, 2, 3]])
    base = gpt2()
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, LoRAConv1DHF)
    assert isinstance(layer, Conv1D)
    unmerged = model(ids).logits
    assert not torch.allclose(unmerged, base(ids).logits)
    merge_lora(model)
    torch.testing.assert_close(model(ids).logits, unmerged)
    unmerge_lora(model)
    unload_lora(model)
    assert type(layer) is Conv1D
    assert same_bits(model(ids).logits, base(ids).logits)


def test_all_linear_means_conv1d_too():
    report = find_targets(gpt2(), LoRAConfig(target_modules="all-linear"))
    assert {t.fqn.rpartition(".")[2] for t in report.targets} == {"c_attn", "c_proj", "c_fc"}


def test_the_base_output_is_not_written_to(monkeypatch):
    """Its addmm is reshaped: a view that is not ours to change."""
    outputs, real = [], Conv1D.forward
    monkeypatch.setattr(Conv1D, "forward", lambda self, x: outputs.append(real(self, x)) or outputs[-1])
    y = CASES["hf-conv1d"].layer()(CASES["hf-conv1d"].x())
    assert not torch.equal(outputs[0], y)
