"""What comes after a merge or an injection: another adapter, a checkpoint, a resize."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    apply_lora,
    get_lora_parameters,
    load_adapter,
    merge_lora,
    unload_lora,
)
from lightning_lora.layers import LoRALayer
from tests.conftest import base_bits, snapshot
from tests.faults.kit import CONFIG, IDS, adapted, refused, row
from tests.lit import CONFIG as FC
from tests.lit import LitNet, trainer


@pytest.mark.parametrize("config", [FC, LoRAConfig(**{**FC.to_dict(), "modules_to_save": ["norm"]})], ids=["adapter", "saved_module"])
@row(63)
def test_the_best_checkpoint_after_a_merged_fit(tmp_path: Path, config: LoRAConfig) -> None:
    """`fit`, then `test(ckpt_path="best")`: the best epoch's adapter is tested, not the merged last one's, as without a merge."""

    def run(merge: bool) -> tuple[float, float, LitNet]:
        keep = ModelCheckpoint(tmp_path / str(merge), monitor="step", mode="min", filename="{step}")  # the first epoch counts as the best
        torch.manual_seed(0)  # both runs start with the same adapters
        model = LitNet()
        train = trainer(tmp_path, LoRACallback(config, merge_on_fit_end=merge), keep, max_epochs=2)
        train.fit(model)
        assert [layer.merged for layer in model.modules() if isinstance(layer, LoRALayer)] == [merge] * 2
        best = train.test(model, ckpt_path="best", verbose=False)[0]["test"]
        assert "step=4" in keep.best_model_path
        return best, trainer(tmp_path, LoRACallback(config), max_epochs=2).test(model, verbose=False)[0]["test"], model

    merged, again, model = run(True)
    plain, _, _ = run(False)
    assert merged == again == plain
    last = LitNet()
    trainer(tmp_path, LoRACallback(config), max_epochs=2).fit(last)
    assert trainer(tmp_path, max_epochs=1).test(last, verbose=False)[0]["test"] != merged, "the last one's is another number"
    assert base_bits(model).keys() == base_bits(LitNet()).keys()


@pytest.mark.parametrize("merged", [False, True])
@row(63)
def test_an_adapter_loaded_into_a_merged_model(folder: Path, merged: bool) -> None:
    model = adapted(std=0.5)
    if merged:
        merge_lora(model)
    load_adapter(model, folder)
    assert torch.equal(model(IDS), adapted()(IDS))
    assert snapshot(model)["bits"] == snapshot(adapted())["bits"]


@row(63)
def test_the_base_was_not_kept(folder: Path) -> None:
    model = merge_lora(adapted(std=0.5), reversible=False)
    with refused("'layers.0.q_proj' cannot be unmerged", "reversible=False", model=model, folder=folder):
        load_adapter(model, folder, check_base=False)


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@row(64)
def test_a_resize_that_would_drop_the_adapter(target: str) -> None:
    model = apply_lora(llama(), config=LoRAConfig(rank=2, target_modules=[target]))
    with refused("resize_token_embeddings", "resize before apply_lora", "unload_lora(model)", model=model):
        model.resize_token_embeddings(40)
    unload_lora(model).resize_token_embeddings(40, mean_resizing=False)
    assert model(IDS).logits.shape[-1] == 40


@row(64)
def test_a_resize_beside_the_adapters_is_fine() -> None:
    model = apply_lora(llama(), config=CONFIG)
    before = model(IDS).logits
    model.resize_token_embeddings(40, mean_resizing=False)
    assert torch.equal(model(IDS).logits[..., :32], before)
    assert len(get_lora_parameters(model)) == 4
