"""Folders of PEFT that name a model's modules as earlier releases of transformers did: 4.51 and before for VLMs, 4 for others.

PEFT 0.21 reads some of them. Here all are read, and compute what was trained.
"""

import copy
import json
import re

import pytest
import torch
import transformers as T
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lightning_lora import load_adapter
from tests.sweep.check import outputs

from .models import DEPRECATED_BY_PEFT, VOCAB, randomise

pytestmark = pytest.mark.filterwarnings(DEPRECATED_BY_PEFT, "ignore:Setting `save_embedding_layers`")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": VOCAB, "num_key_value_heads": 4, "head_dim": 8, **SIZES}
VISION = {"image_size": 16, "patch_size": 8, **SIZES}
PREFIX = "base_model.model."


def llava():
    text, vision = T.LlamaConfig(**TEXT), T.CLIPVisionConfig(**VISION)
    return T.LlavaForConditionalGeneration(T.LlavaConfig(text_config=text, vision_config=vision, image_token_id=VOCAB - 1))


def gemma3():
    text, vision = T.Gemma3TextConfig(**TEXT).to_dict(), T.SiglipVisionConfig(**VISION).to_dict()
    return T.Gemma3ForConditionalGeneration(T.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"embed_dim": 32, "depth": 2, "num_heads": 4, "hidden_size": 32, "patch_size": 8, "mlp_ratio": 2}
    return T.Qwen2VLForConditionalGeneration(T.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision))


def vit():
    return T.ViTForImageClassification(T.ViTConfig(num_labels=3, **VISION))


def before_4_52(name):
    name = re.sub(r"^lm_head", "language_model.lm_head", re.sub(r"^model\.language_model\.", "language_model.model.", name))
    return re.sub(r"^model\.(vision_tower|multi_modal_projector)", r"\1", name)


def qwen_before_4_52(name):
    return re.sub(r"^model\.language_model\.", "model.", re.sub(r"^model\.visual", "visual", name))


def vit_before_5(name):
    name = name.replace("vit.layers.", "vit.encoder.layer.").replace("mlp.fc1", "intermediate.dense")
    return name.replace("attention.q_proj", "attention.attention.query")


OLD_FULL = [f"language_model.model.layers.{index}.self_attn.q_proj" for index in (0, 1)]
CASES = {
    "llava": (llava, {"target_modules": ["q_proj", "v_proj"]}, before_4_52, {}),
    "llava-regex": (
        llava,
        {"target_modules": r".*language_model.*\.(q|v)_proj"},
        before_4_52,
        {"target_modules": r"language_model\.model\.layers\.\d+\.self_attn\.(q|v)_proj"},
    ),
    "llava-saved": (llava, {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "multi_modal_projector"]}, before_4_52, {}),
    "llava-ranks": (
        llava,
        {"target_modules": ["q_proj"], "rank_pattern": {"language_model.layers.1.self_attn.q_proj": 2}},
        before_4_52,
        {"rank_pattern": {"language_model.model.layers.1.self_attn.q_proj": 2}},
    ),
    "gemma3-whole-names": (
        gemma3,
        {"target_modules": r"model\.language_model.*\.q_proj"},
        before_4_52,
        {"target_modules": OLD_FULL},
    ),
    "qwen2-vl": (qwen2_vl, {"target_modules": ["q_proj", "qkv"]}, qwen_before_4_52, {}),
    "vit": (
        vit,
        {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]},
        vit_before_5,
        {"target_modules": ["query", "intermediate.dense"]},
    ),
}


def written_long_ago(base, peft, rename, fields, folder):
    """PEFT's folder of a trained adapter, with the names of then; and the model that it was of."""
    other = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, **copy.deepcopy(peft))).eval()
    randomise(other)
    other.save_pretrained(folder)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    renamed = {PREFIX + rename(name.removeprefix(PREFIX)): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return other


@pytest.mark.parametrize(("build", "peft", "rename", "fields"), CASES.values(), ids=CASES.keys())
def test_it_computes_what_was_trained(build, peft, rename, fields, tmp_path):
    torch.manual_seed(0)
    base = build().eval()
    other = written_long_ago(base, peft, rename, fields, tmp_path)
    g = torch.Generator().manual_seed(0)
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16, generator=g)}
    inputs = pixels if build is vit else {"input_ids": torch.randint(3, VOCAB - 4, (2, 8), generator=g)}
    expected = outputs(other, inputs)
    ours = load_adapter(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(outputs(ours, inputs), expected, rtol=0, atol=1e-6)
    assert (expected - outputs(base, inputs)).abs().max() > 1e-3
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == sum(p.requires_grad for p in other.parameters())


def test_a_module_that_has_a_targeted_name_only_today(tmp_path):
    """The file's layers are those it has tensors of; PEFT of that time found no others."""
    torch.manual_seed(0)
    base = llava()
    old = {"target_modules": ["q_proj"]}
    written_long_ago(base, {"target_modules": r".*language_model.*\.q_proj"}, before_4_52, old, tmp_path)
    trained = [name for name, p in load_adapter(base, tmp_path).named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all("language_model" in name for name in trained)


def test_an_adapter_of_one_expert_alone_is_refused(tmp_path):
    torch.manual_seed(0)
    base = T.MixtralForCausalLM(T.MixtralConfig(**TEXT, num_local_experts=4))
    peft = {"target_modules": ["q_proj"]}
    written_long_ago(base, peft, lambda name: name.replace("1.self_attn.q_proj", "1.block_sparse_moe.experts.0.w1"), {}, tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: the file has no whole pair for expert 1"):
        load_adapter(base, tmp_path)


def test_a_module_under_an_old_and_a_new_name(tmp_path):
    torch.manual_seed(0)
    base = llava()
    written_long_ago(base, {"target_modules": ["q_proj"]}, before_4_52, {}, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"{PREFIX}language_model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {name.replace("language_model.model", "model.language_model"): tensors[name].clone()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="the same module under two names, an old and a new one"):
        load_adapter(base, tmp_path)
