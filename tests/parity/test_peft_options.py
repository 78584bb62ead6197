"""PEFT's options in combination, in float64: each file loads with PEFT's outputs and goes back, or is refused with the true reason."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lightning_lora import load_adapter, save_adapter

from .models import DEPRECATED_BY_PEFT, base, close, logits

pytestmark = pytest.mark.filterwarnings(
    DEPRECATED_BY_PEFT,
    "ignore:Setting `save_embedding_layers`",
    "ignore:ensure_weight_tying=True but",
    "ignore:You have requested `ensure_weight_tying`",
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Model with `tie_word_embeddings=True`",
    "ignore:.*lora_bias=True. was passed but",
    "ignore:Adapter 'default'. [0-9]+ LoRA tensor",
    "ignore:The following rank_pattern keys did not match",
    "ignore:fan_in_fan_out is set to",
    "ignore:PEFT 0.21 lets",
)
TIES, EMB = {"ensure_weight_tying": True}, ["embed_tokens"]
EQUAL = [
    # Nothing is tied: the field means nothing.
    ("llama", {"modules_to_save": EMB, **TIES}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"], **TIES}),
    # Trained in full, embedding and head are one parameter.
    ("llama-tied", {"modules_to_save": EMB, **TIES}),
    ("llama-tied", {"modules_to_save": ["lm_head"], **TIES}),
    ("llama-tied", {"modules_to_save": ["embed_tokens", "lm_head"], **TIES}),
    ("gpt2", {"modules_to_save": ["lm_head"], **TIES}),
    # Weights that are stored as a linear's transposed.
    ("llama", {"target_modules": [], "target_parameters": ["embed_tokens.weight"]}),
    (
        "llama-tied",
        {"target_modules": [], "target_parameters": ["embed_tokens.weight", "q_proj.weight"], "rank_pattern": {"embed_tokens.weight": 3}},
    ),
    ("gpt2", {"target_modules": [], "target_parameters": ["c_attn.weight"], "use_rslora": True}),
    # A bias on B, beside other biases.
    ("llama", {"lora_bias": True, "lora_alpha": 3, "use_rslora": True}),
    ("llama-bias", {"target_modules": "all-linear", "lora_bias": True, "bias": "all"}),
    ("gpt2", {"lora_bias": True, "bias": "lora_only"}),
    ("bert", {"lora_bias": True, "task_type": "SEQ_CLS"}),
    # Rows beside everything else.
    ("llama-tied", {"trainable_token_indices": [5, 3], "use_dora": True}),
    ("llama-bias", {"trainable_token_indices": [5, 3], "lora_bias": True}),
    ("llama", {"trainable_token_indices": [5, 3], "modules_to_save": ["lm_head"]}),
    ("llama", {"trainable_token_indices": [5, 3], "target_modules": ["q_proj", "lm_head"]}),
    ("llama-tied", {"trainable_token_indices": [5, 3], "bias": "all", "target_modules": "all-linear"}),
    ("gpt2", {"trainable_token_indices": [5, 3], "target_modules": [], "target_parameters": ["c_attn.weight"]}),
    ("t5", {"trainable_token_indices": [5, 3]}),
    ("bert", {"trainable_token_indices": [5, 3], "task_type": "SEQ_CLS"}),
]
REFUSED = [
    ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"], **TIES}, "ties the adapter on 'model.embed_tokens' to 'lm_head'"),
    ("llama-tied", {"modules_to_save": EMB}, "embed_tokens.weight is tied to lm_head.weight, which would train too"),
    ("gpt2", {"modules_to_save": ["wte"], **TIES}, "wte.weight is tied to lm_head.weight"),  # PEFT leaves the head as it is
    (
        "llama-tied",
        {"trainable_token_indices": [5], "target_modules": ["q_proj", "lm_head"]},
        "'lm_head' is tied to 'model.embed_tokens', whose",
    ),
    ("t5", {"trainable_token_indices": {"shared": [5], "lm_head": [3]}}, "share a weight with .* and name different rows"),
]
TARGETS = {"gpt2": ["c_attn"], "bert": ["query"], "t5": ["q"]}


def written(name, options, folder):
    """PEFT's model with an adapter that matters, and the base; its folder."""
    plain = base(name).double()
    options = {"target_modules": TARGETS.get(name, ["q_proj"]), **copy.deepcopy(options)}
    other = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, **options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(other.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.2)
    other.save_pretrained(folder)
    return plain, other


@pytest.mark.parametrize(("name", "options"), EQUAL, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_equal_both_ways(name, options, tmp_path):
    plain, other = written(name, options, tmp_path / "theirs")
    expected = logits(other, name)
    model = load_adapter(copy.deepcopy(plain), tmp_path / "theirs").eval()
    close(logits(model, name), expected)
    assert (expected - logits(plain, name)).abs().max() > 1e-3
    save_adapter(model, tmp_path / "ours")
    close(logits(load_adapter(copy.deepcopy(plain), tmp_path / "ours").eval(), name), expected)
    close(logits(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval(), name), expected)


@pytest.mark.parametrize(
    ("name", "options", "reason"), REFUSED, ids=lambda value: value if isinstance(value, str) and " " not in value else None
)
def test_refused_with_the_true_reason(name, options, reason, tmp_path):
    plain, _ = written(name, options, tmp_path)
    with pytest.raises(ValueError, match=reason):
        load_adapter(plain, tmp_path)
