"""The advised learning rate: the published formula's numbers, each factor alone, and what a run does with it."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.optim import advice
from lightning_lora.optim.advice import advise_learning_rate, advise_setup


def llama(width=2000):
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=8, hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4)
        )


def rate(width=2000, lora_plus_ratio=1.0, steps=None, galore_scale=None, full=False, **config):
    model = llama(width)
    if not full:
        apply_lora(model, LoRAConfig(**{"alpha": 32, **config}))
    return advise_learning_rate(model, lora_plus_ratio=lora_plus_ratio, steps=steps, galore_scale=galore_scale)


@pytest.mark.parametrize(("width", "published"), [(2048, 4.9e-4), (4096, 2.9e-4), (8192, 1.7e-4)])
def test_the_published_formula(width, published):
    """5e-5 · 10 · (2000 / width)^0.781, for Llama 3.2 1B, 3.1 8B and 70B at alpha 32."""
    assert rate(width).value == pytest.approx(published, rel=0.02)
    assert rate(width, full=True).value == pytest.approx(published / 10, rel=0.03)


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({"rank": 64}, 1),  # nearly independent of the rank
        ({"rank": 1}, 1),
        ({"alpha": 16}, 2),
        ({"alpha": 64}, 0.5),
        ({"rank": 16, "scaling": "rslora"}, 1 / 4),  # α/√r is √r times as strong
        ({"variant": "dora"}, 1),
        ({"variant": "lora_fa"}, 1),
        ({"variant": "vera", "target_modules": ["q_proj"], "alpha": 16}, 10),  # which has no alpha
        ({"variant": "adalora"}, 8),
        ({"lora_plus_ratio": 16}, 1 / 16),  # A's; B has LoRA's
        ({"steps": 40}, 1.5),
        ({"steps": 400}, 1),
        ({"steps": float("inf")}, 1),
        ({"full": True}, 1 / 10),
        ({"full": True, "galore_scale": 0.25}, 4 / 10),
        ({"full": True, "lora_plus_ratio": 16, "steps": 5}, 1 / 10),  # which are LoRA's
    ],
)
def test_each_factor(change, factor):
    advised = rate(**change)
    assert advised.value == pytest.approx(5e-4 * factor, rel=0.06)
    assert "width 2000" in advised.reason and "\n" not in advised.reason


def test_an_init_that_keeps_its_start_counts_its_own_scaling():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    plain, pissa = (
        advise_learning_rate(apply_lora(nn.Sequential(nn.Linear(64, 64)), LoRAConfig(init=init, target_modules=["0"])))
        for init in ("kaiming", "pissa")
    )
    assert plain == pissa
    assert advise_learning_rate(model).reason == plain.reason.partition(",")[0]  # untouched: full fine-tuning


def test_width_of_any_model():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=24, n_layer=1, n_head=2, n_positions=8))
    assert "width 24" in advise_learning_rate(gpt2).reason
    conv = apply_lora(nn.Sequential(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 40, 3)), LoRAConfig(target_modules=["0", "1"], rank=2))
    assert "width 40" in advise_learning_rate(conv).reason
    with pytest.raises(ValueError, match="BatchNorm1d has no matrices to take a width from; give the learning rate as a number"):
        advise_learning_rate(nn.BatchNorm1d(4))


def test_advice_on_layers_rank_and_batch():
    few = advise_setup(apply_lora(llama(64), LoRAConfig(rank=4)), batch=64)
    assert few[0].startswith("target_modules: 2 of 8 linear layers. 'all-linear' learns more")
    assert few[1].startswith("rank: 4, 1,024 adapter parameters: room for about 2,048 answer tokens")
    assert few[2] == "effective batch: 64 rows. Above 32, LoRA learns less per row than full fine-tuning."
    all_linear = LoRAConfig(target_modules="all-linear", rank_pattern={"q_proj": 2})
    many = advise_setup(apply_lora(llama(64), all_linear), batch=32)
    assert many[0] == "target_modules: 7 of 8 linear layers." and many[1].startswith("rank: 2 to 8, ")
    assert many[2] == "effective batch: 32 rows."
    assert len(advise_setup(apply_lora(llama(64), all_linear))) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("machine", ["x86_64", "arm64"])
@pytest.mark.parametrize("hardware", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda", None])
def test_advice_on_weights_that_the_processor_multiplies_slowly(dtype, machine, hardware, device, monkeypatch):
    monkeypatch.setattr(advice, "cpu_multiplies_bfloat16", lambda: hardware)
    monkeypatch.setattr(advice.platform, "machine", lambda: machine)
    lines = advise_setup(apply_lora(llama(64).to(dtype), LoRAConfig()), device=device)
    slow = (dtype, machine, hardware, device) == (torch.bfloat16, "x86_64", False, "cpu")
    assert [line for line in lines if "dtype" in line] == [
        "dtype: bfloat16, for which this processor has no instructions; float32 is several times as fast."
    ] * slow
