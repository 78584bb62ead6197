"""Tiny models of several architectures, and packed rows for them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor

from lightning_lora.data.batching import Example
from lightning_lora.data.packing import PackedRows

VOCAB = 64
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.3}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 12, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
CONV = {"layer_types": ["conv", "full_attention"]}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
DELTA = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "Gemma3Text": {"num_key_value_heads": 2, "head_dim": 8, **MIXED},
    "GPT2": GPT2,
    "Gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "Qwen3Moe": {"num_key_value_heads": 2, "head_dim": 8, **EXPERTS},
    # Not fit for every attention, or for none.
    "Llama4Text": {
        **{"head_dim": 8, "num_key_value_heads": 2, "num_local_experts": 2, "intermediate_size_mlp": 48},
        **{"attention_chunk_size": 5, "layer_types": ["chunked_attention", "full_attention"]},
    },
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Mamba": {"state_size": 4},
    "Lfm2": {"num_key_value_heads": 2, **CONV},
    "Qwen3Next": {"head_dim": 8, "num_key_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, **DELTA, **EXPERTS},
    "Falcon": {"alibi": True},
    "XGLM": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "init_std": 0.3},
}


def model(name: str, dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    """Random weights, large enough for attention to matter."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **TOKENS, **ARCHITECTURES[name], **fields})
    return (
        transformers.AutoModelForCausalLM.from_config(
            config, experts_implementation="eager" if "num_experts" in ARCHITECTURES[name] else None
        )
        .to(dtype)
        .train()
    )


class Documents(list[Example]):
    """Examples as the data module stores them."""

    @property
    def lengths(self) -> list[int]:
        return [len(example) for example in self]


def documents(lengths: list[int] = [7, 5, 9, 3, 1, 12]) -> Documents:  # noqa: B006
    """Random tokens, all of them labels."""
    rows = [torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in lengths]
    return Documents(Example(ids, list(ids)) for ids in rows)


def packed_batch(examples: Documents, length: int = 24, rows: int = 2) -> dict[str, Any]:
    """The first rows of a batch."""
    packed = PackedRows(examples, length, rows)
    return packed.collate([packed[i] for i in range(min(rows, len(packed)))], pad=0)


def alone(network: Any, batch: dict[str, Any]) -> Tensor:
    """The logits of each document of a packed batch by itself, put back into its rows: (B, T, V)."""
    ids = batch["input_ids"].flatten()
    bounds = [(begin, end) for begin, end in pairwise(batch["cu_seq_lens_q"].tolist()) if end > begin]
    logits = [network(input_ids=ids[None, begin:end], use_cache=False).logits for begin, end in bounds]
    return torch.cat(logits, 1).view(*batch["input_ids"].shape, -1)
