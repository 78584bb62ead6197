"""Folders from before transformers 5, with an adapter on each expert's linears: they load with PEFT's outputs, complete or not at all."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lightning_lora import load_adapter, lora_layers, merge_lora, save_adapter

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
}
EXPERTS, WIDTH, IDS = 4, 24, torch.tensor([[5, 3, 9, 1, 40, 22]])
ALL = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}
PREFIX = {"mixtral": "block_sparse_moe.experts", "qwen3_moe": "mlp.experts"}


def base(family):
    torch.manual_seed(0)
    if family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=EXPERTS))
    else:
        own = {"moe_intermediate_size": WIDTH, "num_experts": EXPERTS, "head_dim": 4}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **own))
    model.set_experts_implementation("eager")  # the others do not compute in float64
    return model.double().eval()


def written(folder, family, names, ranks=None, leave=(), **fields):
    """A folder as PEFT wrote it then; ``ranks`` by name, else 2."""
    generator, tensors = torch.Generator().manual_seed(1), {}

    def pair(module, rows, columns, rank):
        for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            tensors[f"base_model.model.model.{module}.lora_{part}.weight"] = torch.randn(shape, generator=generator) * 0.3

    for layer in range(2):
        pair(f"layers.{layer}.self_attn.q_proj", 16, 16, 2)
        for expert in range(EXPERTS):
            for name in names:
                shape = (16, WIDTH) if name in ("w2", "down_proj") else (WIDTH, 16)
                pair(f"layers.{layer}.{PREFIX[family]}.{expert}.{name}", *shape, (ranks or {}).get(name, 2))
    tensors = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in leave)}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": [*names, "q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(said | {"lora_dropout": 0.0, "bias": "none", "peft_version": "0.15.0"} | fields))
    return folder


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")  # PEFT's own
@pytest.mark.parametrize("family", ALL)
def test_it_loads_with_pefts_outputs(family, tmp_path):
    folder = written(tmp_path / "old", family, ALL[family])
    wanted = peft.PeftModel.from_pretrained(base(family), folder).eval()(input_ids=IDS).logits
    model = load_adapter(base(family), folder).eval()
    found = model(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # the file has float32
    assert (wanted - base(family)(input_ids=IDS).logits).norm() > 0.1 * wanted.norm()
    again = load_adapter(base(family), save_adapter(model, tmp_path / "new")).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, found, rtol=1e-6, atol=1e-6)
    model(input_ids=IDS).logits.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    merge_lora(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, found, rtol=1e-5, atol=1e-5)


def dense(layer, weight):
    return layer.by_weight()[weight].merge_delta().detach()


@pytest.mark.parametrize("rslora", [False, True])  # PEFT 0.21 doubles alpha with the rank of two projections: √2 too much for rsLoRA
@pytest.mark.parametrize(
    ("names", "ranks", "alphas"), [(("w1", "w2"), {}, {}), (("w3",), {}, {}), (ALL["mixtral"], {"w3": 3, "w2": 1}, {"w1": 2, "w2": 5})]
)
def test_every_expert_has_the_files_update(names, ranks, alphas, rslora, tmp_path):
    folder = written(tmp_path / "old", "mixtral", names, ranks, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    model = load_adapter(base("mixtral"), folder)
    layer = dict(lora_layers(model))["model.layers.1.mlp.experts"]
    tensors = load_file(folder / "adapter_model.safetensors")

    def update(expert, name):
        stem = f"base_model.model.model.layers.1.{PREFIX['mixtral']}.{expert}.{name}"
        if name not in names:
            return torch.zeros((16, WIDTH) if name == "w2" else (WIDTH, 16)).double()
        A, B = (tensors[f"{stem}.lora_{part}.weight"].double() for part in "AB")
        return alphas.get(name, 8) / ranks.get(name, 2) ** (0.5 if rslora else 1) * B @ A

    for expert in range(EXPERTS):
        wanted = torch.cat([update(expert, "w1"), update(expert, "w3")])
        torch.testing.assert_close(dense(layer, "gate_up_proj")[expert].double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dense(layer, "down_proj")[expert].double(), update(expert, "w2"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"leave": (".experts.2.w1.lora_A",)}, "gate_up_proj: the file has no whole pair for expert 2"),
        ({"leave": (".experts.3.",)}, "the file has no whole pair for expert 3"),
        ({"use_dora": True}, "w1' is part of 'model.layers.0.mlp.experts.gate_up_proj' in this version of the model"),
    ],
)
def test_what_is_not_whole_is_refused_and_changes_nothing(changes, reason, tmp_path):
    folder, model = written(tmp_path / "old", "mixtral", ALL["mixtral"], **changes), base("mixtral")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=reason):
        load_adapter(model, folder)
    assert not any(lora_layers(model)) and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
