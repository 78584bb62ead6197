from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora, export_merged, get_lora_parameters, merge_lora


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = apply_lora(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)), config=LoRAConfig(target_modules="all-linear"))
    for parameter in get_lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 10_000], ids=["one file", "shards"])
@pytest.mark.parametrize("merged", [False, True])
def test_from_pretrained_reads_it(model: LlamaForCausalLM, tmp_path: Path, merged: bool, shard_bytes: int) -> None:
    ids = torch.arange(8)[None]
    wanted = model(ids).logits
    if merged:
        merge_lora(model)
    folder = export_merged(model, tmp_path / "out", shard_bytes=shard_bytes)
    assert (len(list(folder.glob("*.safetensors"))) == 1) == (shard_bytes > 1_000_000)
    assert not list(folder.glob(".*"))
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, wanted, rtol=1e-5, atol=1e-6)
    assert all(layer.merged is merged for layer in model.modules() if hasattr(layer, "merged"))


def test_a_folder_that_is_not_empty_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="is not empty"):
        export_merged(model, tmp_path)
    export_merged(model, tmp_path, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "keep"
