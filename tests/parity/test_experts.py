"""Experts in one tensor per projection: PEFT's ``target_parameters`` computes what we compute, and each reads the other's folders."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lightning_lora import LoRAConfig, apply_lora, find_targets, get_lora_parameters, load_adapter, save_adapter
from lightning_lora.layers.experts import LoRAExperts
from tests.sweep.archs import build
from tests.sweep.check import in_float64, outputs

from .models import DEPRECATED_BY_PEFT

pytestmark = [
    pytest.mark.filterwarnings(DEPRECATED_BY_PEFT),
    pytest.mark.filterwarnings("ignore:rank=4 of", "ignore:target_modules='all-linear' leaves out"),  # tiny gates; Mamba's mixers
    pytest.mark.filterwarnings(
        "ignore:The following (rank|alpha)_pattern keys did not match"
    ),  # PEFT looks for modules only, yet acts on them
]

QUICK = ["qwen3_moe", "gpt_oss", "llama4_text"]  # a layout each
SLOW = [
    *("afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "ernie4_5_moe", "exaone_moe", "glm4_moe", "glm4_moe_lite", "granitemoe"),
    *("hunyuan_v1_moe", "jamba", "jetmoe", "laguna", "minimax", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_next"),
    *("solar_open", "nemotron_h", "aria_text", "flex_olmo", "granitemoeshared", "minimax_m2", "cohere2_moe"),
]
architectures = pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])


def base_of(name):
    """A model in float64, where its own code allows it, an input, and the names of its experts' weights."""
    model, inputs = build(name)
    model.set_experts_implementation("eager") if hasattr(model.config, "_experts_implementation") else None
    model, inputs, exact = in_float64(model, inputs)
    report = find_targets(model, LoRAConfig(rank=1, target_modules="all-linear", modules_to_save=[]))
    weights = [f"{target.fqn}.{name}" for target in report.targets if issubclass(target.kind, LoRAExperts) for name in target.kind.adapted]
    assert weights
    return model, inputs, exact, weights


def fill(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=generator)
    return model


def near(found, wanted, base, exact):
    assert (wanted - base).abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10 if exact else 2e-6)


def pefts(base, weights, folder, exact, **fields):
    """PEFT's model over a copy of the base, filled and saved."""
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": [], "target_parameters": weights} | fields)
    )
    model = fill(model.double() if exact else model).eval()
    model.save_pretrained(folder)
    return model


@architectures
def test_peft_reads_ours_and_we_read_pefts(name, tmp_path):
    base, inputs, exact, weights = base_of(name)
    before = outputs(base, inputs)
    ours = fill(apply_lora(copy.deepcopy(base), LoRAConfig(rank=4, alpha=6, target_modules="all-linear", modules_to_save=[])))
    save_adapter(ours, tmp_path / "ours")
    wanted = outputs(ours, inputs)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    near(outputs(theirs.double() if exact else theirs, inputs), wanted, before, exact)
    assert torch.equal(outputs(load_adapter(copy.deepcopy(base), tmp_path / "ours"), inputs), wanted)

    theirs = pefts(base, weights, tmp_path / "theirs", exact)
    loaded = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    near(outputs(loaded, inputs), outputs(theirs, inputs), before, exact)
    save_adapter(loaded, tmp_path / "again")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()
    near(outputs(again.double() if exact else again, inputs), outputs(theirs, inputs), before, exact)


@pytest.mark.parametrize("name", QUICK)
def test_gradients_are_pefts(name, tmp_path):
    base, inputs, exact, weights = base_of(name)
    theirs = pefts(base, weights, tmp_path, exact)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    for model in (theirs, ours):
        outputs(model, inputs, grad=True).square().sum().backward()
    mine, others = ([p.grad.double().norm() for p in model.parameters() if p.requires_grad] for model in (ours, theirs))
    assert len(mine) == len(others) == 2 * len(weights) and all(mine)
    torch.testing.assert_close(torch.stack(mine).square().sum(), torch.stack(others).square().sum(), rtol=1e-9 if exact else 1e-4, atol=0)


def old_layout(folder, version="0.18.0"):
    """Rewrite a folder of PEFT 0.21 as releases up to 0.18 wrote it: A always on the first axis of a matrix."""
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name in [name for name in tensors if ".lora_A." in name]:
        A, B = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        A, B = A.unflatten(0, (4, -1)), B.unflatten(1, (-1, 4)).permute(2, 0, 1)  # 4 experts
        tensors[name] = B.mT.flatten(0, 1).contiguous()
        tensors[name.replace("lora_A", "lora_B")] = A.mT.permute(1, 2, 0).flatten(1).contiguous()
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    change(folder, peft_version=version)


def change(folder, **fields):
    file = folder / "adapter_config.json"
    said = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))


@pytest.mark.parametrize("version", ["0.18.0", None])
def test_folders_of_pefts_older_layout(version, tmp_path):
    base, inputs, exact, weights = base_of("qwen3_moe")
    theirs = pefts(base, weights, tmp_path, exact)
    old_layout(tmp_path, version)  # the sizes tell, without a version too
    near(outputs(load_adapter(copy.deepcopy(base), tmp_path), inputs), outputs(theirs, inputs), outputs(base, inputs), exact)


def square():
    """Qwen3-MoE whose ``gate_up_proj`` is square: its sizes do not tell the layouts apart."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, head_dim=8, num_experts=4, num_experts_per_tok=2)
    )
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.double().eval(), {"input_ids": torch.arange(12).reshape(2, 6)}


def test_square_matrices_go_by_the_release_that_wrote_the_folder(tmp_path):
    base, inputs = square()
    weights = ["experts.gate_up_proj", "experts.down_proj"]
    theirs = pefts(base, weights, tmp_path / "new", True)
    theirs.save_pretrained(tmp_path / "old")
    old_layout(tmp_path / "old")
    for folder in ("new", "old"):
        near(outputs(load_adapter(copy.deepcopy(base), tmp_path / folder), inputs), outputs(theirs, inputs), outputs(base, inputs), True)
    change(tmp_path / "new", peft_version=None)
    plain = copy.deepcopy(base)
    with pytest.raises(
        ValueError, match=r"'model.layers.0.mlp.experts': gate_up_proj: its matrices are square \(32\).* names no peft_version"
    ):
        load_adapter(plain, tmp_path / "new")
    assert not any("lora" in name for name, _ in plain.named_parameters())
    ours = fill(apply_lora(copy.deepcopy(base), LoRAConfig(rank=2, target_modules=["experts"])))
    save_adapter(ours, tmp_path / "ours")  # its own files need no version
    assert torch.equal(outputs(load_adapter(plain, tmp_path / "ours"), inputs), outputs(ours, inputs))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_parameters": ["mlp.experts.down_proj"]},
        {
            "target_parameters": ["gate_up_proj", "down_proj"],
            "rank_pattern": {r".*\.gate_up_proj": 8},
            "alpha_pattern": {r".*\.gate_up_proj": 12},
        },
        {"rank_pattern": {"experts.down_proj": 2}, "use_rslora": True},
        {"alpha_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 3}},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}},
    ],
    ids=["one weight", "as PEFT converts files of transformers 4", "ranks under rslora", "alphas", "beside linears"],
)
def test_parts_ranks_and_alphas_of_pefts_folders(fields, tmp_path):
    base, inputs, exact, weights = base_of("qwen3_moe")
    theirs = pefts(base, weights, tmp_path / "theirs", exact, **fields)
    loaded = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    near(outputs(loaded, inputs), outputs(theirs, inputs), outputs(base, inputs), exact)
    save_adapter(loaded, tmp_path / "again")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()
    near(outputs(again.double() if exact else again, inputs), outputs(theirs, inputs), outputs(base, inputs), exact)


def test_zeros_that_fill_a_lower_rank_stay_zero_in_training(tmp_path):
    base, inputs, exact, weights = base_of("qwen3_moe")
    pefts(base, weights, tmp_path, exact, rank_pattern={"experts.down_proj": 2})
    model = load_adapter(base, tmp_path)
    layer = model.get_submodule("model.layers.0.mlp.experts")
    optimizer = torch.optim.AdamW(get_lora_parameters(model), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        outputs(model, inputs, grad=True).square().sum().backward()
        optimizer.step()
    A, B = layer.by_weight()["down_proj"].factor_matrices()
    assert A.shape[1] == 4 and not A[:, 2:].any() and not B[..., 2:].any() and A[:, :2].any()


def test_what_is_no_experts_weight_is_refused(tmp_path):
    base, _, exact, weights = base_of("gpt_oss")
    pefts(base, [*weights, "experts.gate_up_proj_bias"], tmp_path, exact)
    with pytest.raises(ValueError, match="names its gate_up_proj_bias, which is not a weight of experts"):
        load_adapter(base, tmp_path)


def test_a_folder_with_dropout_says_that_peft_has_none(tmp_path):
    base, inputs, exact, _ = base_of("qwen3_moe")
    ours = fill(apply_lora(copy.deepcopy(base), LoRAConfig(rank=2, dropout=0.1, target_modules=["experts", "q_proj"])))
    with pytest.warns(UserWarning, match=r"PEFT 0.21 has no dropout on 'model.layers.0.mlp.experts'.*lora_dropout=0"):
        save_adapter(ours, tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    assert loaded.get_submodule("model.layers.0.mlp.experts").lora_dropout.p == 0.1
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    near(outputs(theirs.double() if exact else theirs, inputs), outputs(ours.eval(), inputs), outputs(base, inputs), exact)
