"""Parity with PEFT 0.21: forward, every adapter gradient and ten AdamW steps agree to 1e-6 in fp32, on six families of models."""

import pytest
import torch
from torch import nn

from lightning_lora import get_lora_parameters

from .models import DEPRECATED_BY_PEFT, base, batch, close, logits, trained, twins

pytestmark = pytest.mark.filterwarnings(DEPRECATED_BY_PEFT)

ATTENTION_MLP = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "vit": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
}
CASES = {
    "llama": ("llama", {"target_modules": ATTENTION_MLP["llama"]}),
    "llama-embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "r": 4}),
    "llama-patterns": (
        "llama",
        {
            "target_modules": ATTENTION_MLP["llama"],
            "rank_pattern": {"q_proj": 2, "1.mlp.up_proj": 3},
            "alpha_pattern": {"v_proj": 5},
            "use_rslora": True,
        },
    ),
    "llama-bias": ("llama-bias", {"target_modules": ["q_proj", "v_proj", "down_proj"], "bias": "lora_only"}),
    "bert": ("bert", {"target_modules": ATTENTION_MLP["bert"], "modules_to_save": ["classifier"]}),
    "bert-embedding": ("bert", {"target_modules": ["word_embeddings", "position_embeddings", "query"], "lora_alpha": 20}),
    "bert-bias": ("bert", {"target_modules": ["query", "value"], "bias": "all"}),
    "gpt2": ("gpt2", {"target_modules": ATTENTION_MLP["gpt2"], "fan_in_fan_out": True}),
    "gpt2-embedding": ("gpt2", {"target_modules": ["wpe", "c_attn"], "fan_in_fan_out": True}),
    "t5": ("t5", {"target_modules": ATTENTION_MLP["t5"]}),
    "t5-embedding": ("t5", {"target_modules": ["relative_attention_bias", "q", "v"], "r": 4}),
    "vit": ("vit", {"target_modules": ATTENTION_MLP["vit"], "modules_to_save": ["classifier"]}),
    "vit-conv": ("vit", {"target_modules": ["projection", "q_proj", "v_proj"]}),
    "resnet": ("resnet", {"target_modules": ["convolution"], "modules_to_save": ["classifier"]}),
    "resnet-bias": ("resnet", {"target_modules": ["convolution", "classifier.1"], "bias": "all", "r": 2}),
    "llama-dora": ("llama", {"target_modules": ATTENTION_MLP["llama"], "use_dora": True}),
    "llama-dora-embedding": (
        "llama",
        {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "r": 4, "use_dora": True, "use_rslora": True},
    ),
    "bert-dora-bias": ("bert", {"target_modules": ["query", "value"], "bias": "all", "use_dora": True}),
    "gpt2-dora": ("gpt2", {"target_modules": ATTENTION_MLP["gpt2"], "fan_in_fan_out": True, "use_dora": True}),
    # A convolution, but none before a batch norm, which takes the magnitude out again: its gradient is zero but for rounding.
    "vit-dora-conv": ("vit", {"target_modules": ["projection", "q_proj", "v_proj"], "use_dora": True}),
}
CASES = {key: (name, {"lora_alpha": 12, **peft}) for key, (name, peft) in CASES.items()}  # scaling 1 would hide it where it is missing
cases = pytest.mark.parametrize(("name", "peft"), CASES.values(), ids=CASES.keys())


def gradients(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    model.train()
    model(**batch(name)).loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
    flat = {key for key in trained(model) if key.endswith("magnitude_vector")}  # PEFT's of a convolution has more dimensions
    return {key: p.grad.flatten() if key in flat else p.grad for key, p in trained(model).items()}


@cases
def test_forward(name, peft):
    ours, theirs = twins(base(name), **peft)
    close(logits(ours, name), logits(theirs, name))
    assert (logits(ours, name) - logits(base(name), name)).abs().max() > 1e-2  # the adapter does something


@cases
def test_every_gradient(name, peft):
    ours, theirs = twins(base(name), **peft)
    got, expected = gradients(ours, name), gradients(theirs, name)
    assert got.keys() == expected.keys()
    for key in expected:
        close(got[key], expected[key], what=key)
        size = expected[key].norm()
        if "key.bias" not in key:  # softmax does not see it: the gradient is zero but for rounding
            assert (got[key] - expected[key]).norm() <= 1e-5 * size, key
            assert size > 5e-5, key  # equal, and not because both are zero
    adapters = {id(p) for p in get_lora_parameters(ours)}
    assert adapters >= {id(p) for key, p in trained(ours).items() if ".lora_" in key}


@cases
def test_ten_adamw_steps(name, peft):
    pair = twins(base(name), **peft)
    starts = [{key: p.detach().clone() for key, p in trained(model).items()} for model in pair]
    losses = []
    for model in pair:
        model.train()
        # eps well above rounding: with 1e-8, an entry whose gradient is near zero moves by its rounding error, whatever computed it
        optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-3, eps=1e-4)
        steps = []
        for step in range(10):
            loss = model(**batch(name, seed=step)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.detach())
        losses.append(torch.stack(steps))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    ours, theirs = (trained(model) for model in pair)
    for key in theirs:
        close(ours[key], theirs[key], what=key)
        if "key.bias" not in key:  # its gradient is zero but for rounding
            assert (ours[key] - starts[0][key]).abs().max() > 2e-4, key  # it trained
