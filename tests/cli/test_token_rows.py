"""`--lora.config.trainable_token_indices` through the entry point."""

import json

import pytest
import torch
import transformers

from lightning_lora import load_adapter
from lightning_lora.cli.main import main


@pytest.mark.parametrize("rows", ["[4, 5]", '{"embed_tokens": [4, 5], "lm_head": [6]}'])
def test_rows_of_added_tokens(rows, config, model, tmp_path):
    assert main(["fit", "--config", config, f"--lora.config.trainable_token_indices={rows}"]) == 0
    fields = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["trainable_token_indices"]
    assert fields == ([4, 5] if rows[0] == "[" else {"model.embed_tokens": [4, 5], "lm_head": [6]})
    loaded = load_adapter(transformers.AutoModelForCausalLM.from_pretrained(model), tmp_path / "run" / "adapter")
    layer = loaded.get_input_embeddings()
    assert layer.lora_rows.shape == (2, 32)
    assert not torch.equal(layer.lora_rows, layer.weight[[4, 5]])
