"""The folder that ``export_merged`` writes is that of ``save_pretrained`` on a model merged by hand in float64, file by file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, export_merged, merge_lora, unload_lora
from tests.adapter_io.folders import differences, merged_by_hand, tensors
from tests.conftest import fill
from tests.sweep.archs import build

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' advice on tiny configurations

TEXT: dict[str, Any] = {
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2},
}
VISION: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8},
}


def llava() -> nn.Module:
    return T.LlavaForConditionalGeneration(
        T.LlavaConfig(vision_config=T.CLIPVisionConfig(**VISION), text_config=T.LlamaConfig(**TEXT), image_token_index=39)
    )


def qwen2_vl() -> nn.Module:
    text = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    return T.Qwen2VLForConditionalGeneration(T.Qwen2VLConfig(text_config=text, vision_config=vision))


def detr() -> nn.Module:
    backbone = T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"], layer_type="basic")
    sizes = {"d_model": 32, "num_queries": 4}
    halves = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")}
    config = T.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, **sizes, **halves
    )
    return T.DetrForObjectDetection(config)


def zamba2() -> nn.Module:
    mamba = {"n_mamba_heads": 2, "mamba_headdim": 16, "mamba_d_state": 4, "mamba_ngroups": 1, "chunk_size": 4}
    blocks = {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "kv_channels": 8, "attention_head_dim": 16, "adapter_rank": 2}
    return T.Zamba2ForCausalLM(T.Zamba2Config(**TEXT, **mamba, **blocks))


OWN: dict[str, Callable[[], nn.Module]] = {
    "llava": llava,
    "qwen2_vl": qwen2_vl,
    "detr": detr,
    "zamba2": zamba2,
    "llama tied": lambda: T.LlamaForCausalLM(T.LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "llama classifier": lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**TEXT, num_labels=3, pad_token_id=0)),
    "vit classifier": lambda: T.ViTForImageClassification(T.ViTConfig(**VISION, num_labels=3)),
}
SHARED = ("llama", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "gpt2", "bert", "bart", "t5", "mamba", "swin", "wav2vec2")
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")  # one tensor in memory, one for each expert in files


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return OWN[name]() if name in OWN else build(name)[0]


def both(base: nn.Module, folder: Path, limit: int = 5_000_000_000) -> list[str]:
    """Adapt the model, write it both ways, and say what differs; the adapted model must be as it was."""
    plain = copy.deepcopy(base)
    model = fill(apply_lora(base, LoRAConfig(rank=2, target_modules="all-linear", modules_to_save=[])))
    merged_by_hand(plain, model).save_pretrained(folder / "wanted", max_shard_size=limit)
    before, state = model.config.to_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_merged(model, folder / "found", shard_bytes=limit)
    assert model.config.to_dict() == before
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    return differences(folder / "found", folder / "wanted")


@pytest.mark.parametrize("name", [*OWN, *SHARED])
def test_a_new_model(name: str, tmp_path: Path) -> None:
    assert both(make(name), tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["bf16", "as saved"])
@pytest.mark.parametrize("name", ["llava", "llama tied", "mixtral", "qwen3_moe", "vit classifier", "detr"])
def test_a_loaded_model(name: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    """It remembers how the names and layouts of the files became its own."""
    saved = make(name)
    saved.save_pretrained(tmp_path / "saved")
    assert both(type(saved).from_pretrained(tmp_path / "saved", dtype=dtype).eval(), tmp_path) == []


@pytest.mark.parametrize("name", ["llama", "llava", "bart"])
def test_several_files(name: str, tmp_path: Path) -> None:
    assert both(make(name), tmp_path, limit=9000) == []
    assert len(list((tmp_path / "found").glob("model-*-of-*.safetensors"))) > 3


@pytest.mark.parametrize("name", EXPERTS)
def test_several_files_of_experts(name: str, tmp_path: Path) -> None:
    """``save_pretrained`` puts all pieces of one tensor into one file, above its limit. Here each piece counts by itself."""
    both(make(name), tmp_path, limit=9000)
    found, wanted = (json.loads((tmp_path / side / "model.safetensors.index.json").read_text()) for side in ("found", "wanted"))
    assert found["metadata"] == wanted["metadata"] and found["weight_map"].keys() == wanted["weight_map"].keys()
    mine, theirs = tensors(tmp_path / "found"), tensors(tmp_path / "wanted")
    for key, tensor in theirs.items():
        torch.testing.assert_close(mine[key], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llava", "bert"])
def test_merged_and_unloaded_first_it_is_the_same_folder(name: str, tmp_path: Path) -> None:
    model = fill(apply_lora(make(name), LoRAConfig(rank=2, target_modules="all-linear", modules_to_save=[])))
    export_merged(model, tmp_path / "unmerged")
    export_merged(merge_lora(model), tmp_path / "merged")
    model.save_pretrained(tmp_path / "saved")
    unload_lora(model, merged="keep").save_pretrained(tmp_path / "plain")
    for other in ("merged", "saved", "plain"):
        assert differences(tmp_path / other, tmp_path / "unmerged") == []


def test_the_side_files_are_those_of_this_model(tmp_path: Path) -> None:
    """What stops a chat, and the class and dtype that are in memory now, not those of the base's files."""
    base = T.LlamaForCausalLM(T.LlamaConfig(**TEXT)).bfloat16()
    base.generation_config.eos_token_id, base.generation_config.do_sample, base.generation_config.temperature = [2, 7, 9], True, 0.6
    base.save_pretrained(tmp_path / "base")
    for cls, name in (
        (T.AutoModelForCausalLM, "LlamaForCausalLM"),
        (T.AutoModelForSequenceClassification, "LlamaForSequenceClassification"),
    ):
        model = cls.from_pretrained(tmp_path / "base", dtype=torch.float32)
        folder = export_merged(apply_lora(model, LoRAConfig(rank=2, target_modules=["q_proj"])), tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        assert (config["architectures"], config["dtype"]) == ([name], "float32")
    loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path / "LlamaForCausalLM").generation_config
    assert (loaded.eos_token_id, loaded.do_sample, loaded.temperature) == ([2, 7, 9], True, 0.6)
    assert not (tmp_path / "LlamaForSequenceClassification/generation_config.json").exists()
