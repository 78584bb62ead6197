"""Tiny models with fused projections, by architecture."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MptConfig,
    MptForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "initializer_range": 0.2}
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE: dict[str, Any] = {**SIZES, "intermediate_size": 48, **TOKENS}
GLM: dict[str, Any] = {**WIDE, "num_key_value_heads": 2, "head_dim": 8}


def falcon(**fields: Any) -> nn.Module:
    return FalconForCausalLM(FalconConfig(**SIZES, **TOKENS, **fields))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**WIDE, num_key_value_heads=2)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE)),
    "falcon": lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon-one-kv": lambda: falcon(new_decoder_architecture=False, multi_query=True),
    "falcon-by-head": lambda: falcon(new_decoder_architecture=False, multi_query=False),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.2, **TOKENS)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.2, **TOKENS)),
    "persimmon": lambda: PersimmonForCausalLM(PersimmonConfig(**WIDE)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**WIDE, cls_token_id=1, sep_token_id=2)),
    "mpt": lambda: MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64, initializer_range=0.2)),
}
GATED: dict[str, Callable[[], nn.Module]] = {
    "phi3": MODELS["phi3"],
    "glm": lambda: GlmForCausalLM(GlmConfig(**GLM)),
    "glm4": lambda: Glm4ForCausalLM(Glm4Config(**GLM)),
}
IDS = torch.arange(10).view(2, 5) * 7 % 61 + 3


def build(name: str) -> Any:
    torch.manual_seed(0)
    return {**GATED, **MODELS}[name]().double().eval()


class Attention(nn.Module):
    """timm's attention by its name and its split, reshape(B, N, 3, heads, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


Attention.__module__ = "timm.models.vision_transformer"
