"""Adapters whose ranks changed in training, read by PEFT: equal logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from lightning_lora import apply_lora, load_adapter, resize_ranks, save_adapter

from .models import DEPRECATED_BY_PEFT, base, close, logits, our_config, randomise, read_by_peft

pytestmark = pytest.mark.filterwarnings(DEPRECATED_BY_PEFT)
NAMES = ["q_proj", "o_proj", "down_proj", "embed_tokens"]


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_peft_reads_changed_ranks(fields: dict[str, Any], tmp_path: Path) -> None:
    model = base("llama")
    ours = apply_lora(copy.deepcopy(model), our_config(target_modules=NAMES, r=4, lora_alpha=12, **fields))
    randomise(ours)
    resize_ranks(ours, {"0.self_attn.q_proj": 1, "1.self_attn.q_proj": 7, "down_proj": 3, "embed_tokens": 2}, ())
    save_adapter(ours, tmp_path / "adapter")
    expected = logits(ours.eval(), "llama")
    close(logits(read_by_peft(copy.deepcopy(model), tmp_path / "adapter"), "llama"), expected)
    close(logits(load_adapter(copy.deepcopy(model), tmp_path / "adapter").eval(), "llama"), expected, atol=0)
