"""Architectures whose names transformers converts: PEFT reads our folders, we read PEFT's, and both compute the same."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, load_adapter, save_adapter
from tests.sweep.archs import build
from tests.sweep.check import outputs

from .models import DEPRECATED_BY_PEFT, close

pytestmark = pytest.mark.filterwarnings(DEPRECATED_BY_PEFT, "ignore:target_modules='all-linear' leaves out")

# Their checkpoints have experts one by one, their models one tensor. Dense and shared MLPs have names like the experts of old.
EXPERTS = [
    *("afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "ernie4_5_moe", "exaone_moe", "glm4_moe", "glm4_moe_lite"),
    *("hunyuan_v1_moe", "laguna", "qwen3_next", "solar_open"),
]
OTHERS = ["mixtral", "qwen2_moe", "qwen3_moe", "siglip_vision_model"]
SLOW = ["minimax", "olmoe", "granitemoe", "jetmoe", "t5", "vit", "dinov2", "clip_vision_model", "ijepa", "vivit", "yolos", "deit", "beit"]


def adapted(model, **fields):
    apply_lora(model, LoRAConfig(**{"rank": 4, "target_modules": "all-linear", "modules_to_save": []} | fields))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in get_lora_parameters(model):
            parameter.normal_(std=0.1, generator=generator)
    return model


@pytest.mark.parametrize("name", [*EXPERTS, *OTHERS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
@pytest.mark.filterwarnings("ignore:rank=4 of 'model.layers.*shared_expert_gate'")
def test_peft_reads_ours(name, tmp_path):
    base, inputs = build(name)
    ours = adapted(copy.deepcopy(base))
    save_adapter(ours, tmp_path)
    expected = outputs(ours, inputs)
    close(outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval(), inputs), expected, 2e-6)
    assert torch.equal(outputs(load_adapter(copy.deepcopy(base), tmp_path), inputs), expected)
    assert (expected - outputs(base, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["deepseek_v3", "laguna"])
def test_transformers_own_loader_reads_ours(name, tmp_path):
    base, inputs = build(name)
    ours = adapted(copy.deepcopy(base))
    save_adapter(ours, tmp_path)
    base.load_adapter(tmp_path)
    close(outputs(base.eval(), inputs), outputs(ours, inputs), 2e-6)


@pytest.mark.parametrize("name", EXPERTS[::3])
def test_we_read_pefts(name, tmp_path):
    base, inputs = build(name)
    attention = [fqn for fqn, module in base.named_modules() if fqn.endswith("o_proj") and type(module) is nn.Linear]
    by_weight = [f"{fqn}.weight" for fqn, _ in base.named_modules() if fqn.endswith(("mlp.gate_proj", "experts.up_proj", "expert.up_proj"))]
    config = LoraConfig(r=4, target_modules=attention, target_parameters=by_weight)
    other = get_peft_model(copy.deepcopy(base), config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in other.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.1, generator=generator)
    other.save_pretrained(tmp_path)
    expected = outputs(other, inputs)
    close(outputs(load_adapter(copy.deepcopy(base), tmp_path), inputs), expected, 2e-6)
    assert by_weight and (expected - outputs(base, inputs)).abs().max() > 1e-3


def test_layers_beside_experts_are_named_by_their_weights(tmp_path):
    base, _ = build("deepseek_v3")
    wanted = {"target_modules": ["q_b_proj", "gate_proj", "down_proj"], "rank_pattern": {"shared_experts.down_proj": 2}}
    save_adapter(adapted(copy.deepcopy(base), **wanted), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["q_b_proj"]
    names = ["0.mlp.down_proj", "0.mlp.gate_proj", "1.mlp.shared_experts.down_proj", "1.mlp.shared_experts.gate_proj"]
    assert fields["target_parameters"] == [f"model.layers.{name}.weight" for name in names]
    assert fields["rank_pattern"] == {r"^model\.layers\.1\.mlp\.shared_experts\.down_proj\.weight": 2}


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # PEFT looks for them among modules only
def test_ranks_and_alphas_of_layers_named_by_their_weights(tmp_path):
    base, inputs = build("deepseek_v3")
    fields = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"gate_proj": 3}, "scaling": "rslora"}
    ours = adapted(copy.deepcopy(base), target_modules=["q_b_proj", "gate_proj", "down_proj"], **fields)
    save_adapter(ours, tmp_path)
    with pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match"):
        read = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    close(outputs(read, inputs), outputs(ours, inputs), 2e-6)


@pytest.mark.parametrize(("fields", "message"), [({"variant": "dora"}, "with DoRA"), ({"dropout": 0.1}, "no dropout on 'model.layers.0")])
def test_what_peft_cannot_be_told_is_warned_of(fields, message, tmp_path):
    base, inputs = build("deepseek_v3")
    ours = adapted(copy.deepcopy(base), target_modules=["q_b_proj", "gate_proj"], **fields).eval()
    with pytest.warns(UserWarning, match=message):
        save_adapter(ours, tmp_path)
    assert torch.equal(outputs(load_adapter(copy.deepcopy(base), tmp_path).eval(), inputs), outputs(ours, inputs))
    if "dropout" in fields:
        close(outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval(), inputs), outputs(ours, inputs), 2e-6)


def test_attention_alone_needs_no_other_names(tmp_path):
    save_adapter(adapted(build("deepseek_v3")[0], target_modules=r".*\.(q_b|o)_proj", dropout=0.1), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "target_parameters" not in fields and fields["lora_dropout"] == 0.1
    assert fields["target_modules"] == [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("o_proj", "q_b_proj")]
