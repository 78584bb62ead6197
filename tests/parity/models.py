"""Tiny random models of six families, one batch each, and the twin of a model under PEFT with the same adapter weights.

A configuration is written once, in PEFT's words (`r`, `lora_alpha`, …); `our_config` translates it, so that both sides of every comparison
come from the same line. Names are compared in our form (a module's own name + `.lora_A`); `our_name` translates PEFT's.
"""

import copy
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_lora import LoRAConfig, apply_lora

VOCAB, LABELS = 64, 3
# PEFT asks every transformers model for a property whose name is deprecated.
DEPRECATED_BY_PEFT = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
RENAMED = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "layers_to_transform": "layers"}


# The weights start wider than 0.02, so that every gradient is far above rounding.
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "initializer_range": 0.06,
}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def llama(**kwargs: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **SIZES, **kwargs))


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(vocab_size=VOCAB, num_labels=LABELS, **SIZES, **NO_DROPOUT))


def gpt2() -> nn.Module:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.06, bos_token_id=1, eos_token_id=1, **dropout
    )
    return GPT2LMHeadModel(config)


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, dropout_rate=0.0, initializer_factor=0.5, decoder_start_token_id=0, **sizes)
    )


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=LABELS, **SIZES, **NO_DROPOUT))


def resnet() -> nn.Module:
    model = ResNetForImageClassification(ResNetConfig(embedding_size=16, hidden_sizes=[32, 48], depths=[1, 2], num_labels=LABELS))
    nn.init.normal_(model.classifier[1].weight, std=0.05)  # gradients of the size of the other models'
    return model


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama-bias": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "bert": bert,
    "gpt2": gpt2,
    "t5": t5,
    "vit": vit,
    "resnet": resnet,
}


@cache
def _built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = BUILDERS[name]()
    with torch.no_grad():  # biases start at zero, where an adapter that forgot them would look right
        for key, parameter in model.named_parameters():
            if key.endswith(".bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def base(name: str) -> nn.Module:
    """A fresh copy of the (seeded) base model, in eval mode."""
    return copy.deepcopy(_built(name))


def batch(name: str, seed: int = 0) -> dict[str, Tensor]:
    """One training batch, labels included."""
    g = torch.Generator().manual_seed(seed)
    family = name.partition("-")[0]
    if family in ("vit", "resnet"):
        size = {"vit": 16, "resnet": 32}[family]
        return {"pixel_values": torch.randn(4, 3, size, size, generator=g), "labels": torch.randint(LABELS, (4,), generator=g)}
    ids = torch.randint(2, VOCAB, (4, 10), generator=g)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0  # padding: GPT-2 and Llama take it on the right too
    ids[0, -3:] = 0
    if family == "bert":
        labels = torch.randint(LABELS, (4,), generator=g)
    elif family == "t5":
        labels = torch.randint(2, VOCAB, (4, 7), generator=g)
    else:
        labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits(model: nn.Module, name: str, seed: int = 0) -> Tensor:
    with torch.no_grad():
        return model(**batch(name, seed)).logits


def our_config(**peft: Any) -> LoRAConfig:
    """The same configuration in our words; PEFT's defaults where the two differ (alpha 8, no modules saved unasked)."""
    ours = {RENAMED.get(key, key): value for key, value in peft.items()}
    ours.pop("fan_in_fan_out", None)  # a layer knows how it stores its weight
    if ours.pop("task_type", None) == "SEQ_CLS":
        ours["modules_to_save"] = "auto"
    ours["variant"] = "dora" if ours.pop("use_dora", False) else "lora_bias" if ours.pop("lora_bias", False) else "plain"
    ours["scaling"] = "rslora" if ours.pop("use_rslora", False) else "standard"
    init = ours.pop("init_lora_weights", True)
    ours["init"] = "kaiming" if init is True else init
    if isinstance(ours.get("layers"), int):
        ours["layers"] = [ours["layers"]]
    return LoRAConfig(**{"alpha": 8.0, "modules_to_save": [], **ours})


def our_name(name: str) -> str:
    """PEFT's name of a parameter → ours."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
    name = re.sub(r"\.lora_(?:embedding_)?([AB])\.default(?:\.weight)?$", r".lora_\1", name)
    return name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector").replace(".lora_B.default.bias", ".lora_B_bias")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by our names, on either side."""
    return {our_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Adapters start as a no-op; give every trained parameter (A, B, biases, saved modules) weights that matter, the same on both sides."""
    parameters = trained(model)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(parameters):
            p = parameters[name]
            noise = torch.randn(p.shape, generator=g)
            p.copy_(noise * 0.05 if name.endswith((".lora_A", ".lora_B")) else p + noise * 0.1)


def theirs(model: nn.Module, **peft: Any) -> PeftModel:
    return get_peft_model(model, LoraConfig(**copy.deepcopy(peft))).eval()  # its dropouts are born training


def read_by_peft(model: nn.Module, folder: Path) -> PeftModel:
    """PEFT's reading of a folder, to train on. A key it misses or a field it does not know is a warning: an error in these tests."""
    return PeftModel.from_pretrained(model, folder, is_trainable=True).eval()


def twins(model: nn.Module, **peft: Any) -> tuple[nn.Module, PeftModel]:
    """The model under our adapter and under PEFT's, the same adapter weights in both; `model` itself is not touched."""
    ours, other = apply_lora(copy.deepcopy(model), config=our_config(**peft)), theirs(copy.deepcopy(model), **peft)
    assert trained(ours).keys() == trained(other).keys()
    randomise(ours)
    randomise(other)
    return ours, other


def close(actual: Tensor, expected: Tensor, atol: float = 1e-6, what: str = "") -> None:
    if what.endswith(".lora_magnitude_vector"):  # PEFT's of a convolution is (1, out, 1, …)
        actual, expected = actual.flatten(), expected.flatten()
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=atol, msg=lambda text: f"{what}: {text}")
