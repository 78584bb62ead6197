"""Which slices a config selects: names, exclusions, blocks, patterns, and the fused projection itself."""

import pytest

from lightning_lora import LoRAConfig, apply_lora, lora_layers, save_adapter
from lightning_lora.adapter_io.starting import starting_config
from lightning_lora.model.targeting import find_targets
from tests.conftest import fill
from tests.layers.fused import build


def selected(name="phi3", **fields):
    report = find_targets(build(name), LoRAConfig(rank=2, **fields))
    return {target.fqn.removeprefix("model.layers."): target.spec.slices and target.spec.slices.names for target in report.targets}


def test_names_of_slices_mean_slices():
    both = {f"{i}.self_attn.qkv_proj": ("q_proj", "v_proj") for i in range(2)}
    assert selected(target_modules=["q_proj", "v_proj"]) == both
    assert selected(target_modules=["v_proj", "q_proj", "down_proj"]) == {**both, "0.mlp.down_proj": None, "1.mlp.down_proj": None}
    assert selected(target_modules=r".*1\.(self_attn\.k_proj|mlp\.up_proj)") == {
        "1.self_attn.qkv_proj": ("k_proj",),
        "1.mlp.gate_up_proj": ("up_proj",),
    }
    assert selected(target_modules=["q_proj"], layers=[1]) == {"1.self_attn.qkv_proj": ("q_proj",)}


def test_the_whole_projection_goes_before_its_slices():
    whole = {f"{i}.self_attn.qkv_proj": None for i in range(2)}
    assert selected(target_modules=["qkv_proj"]) == selected(target_modules=["q_proj", "qkv_proj"]) == whole


def test_exclusions_take_slices_away():
    rest = {f"{i}.self_attn.qkv_proj": ("q_proj", "v_proj") for i in range(2)}
    assert selected(target_modules=["qkv_proj"], exclude_modules=["k_proj"]) == rest
    assert selected(target_modules=["q_proj", "k_proj", "v_proj"], exclude_modules=["k_proj"]) == rest
    everything = selected(target_modules="all-linear", exclude_modules=["k_proj", "mlp.gate_proj", "mlp.up_proj"])
    assert everything["0.self_attn.qkv_proj"] == ("q_proj", "v_proj") and everything["0.self_attn.o_proj"] is None
    assert "0.mlp.gate_up_proj" not in everything
    assert set(selected(target_modules="all-linear").values()) == {None}


def test_ranks_and_alphas_by_slice_or_by_the_fused_projection():
    fields = {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"0.self_attn.qkv_proj": 3},
        "alpha_pattern": {"q_proj": 4, "v_proj": 4},
    }
    report = find_targets(build("phi3"), LoRAConfig(rank=2, **fields))
    assert [(target.rank, target.alpha) for target in report.targets] == [(3, 4), (2, 4)]
    with pytest.raises(ValueError, match=r"share one rank and alpha; the patterns give \[3, 2\]"):
        find_targets(build("phi3"), LoRAConfig(rank=2, **{**fields, "rank_pattern": {"q_proj": 3}}))


def test_the_report_and_what_matches_nothing():
    report = str(find_targets(build("phi3"), LoRAConfig(rank=2, target_modules=["q_proj", "up_proj"])))
    assert "model.layers.*.self_attn.qkv_proj (q_proj)" in report and "target_modules 'up_proj': 2 modules" in report
    with pytest.raises(ValueError, match=r"'qproj' matches no module. Nearest names: .*q_proj"):
        find_targets(build("phi3"), LoRAConfig(target_modules=["qproj"]))


def test_another_choice_of_slices_is_another_adapter():
    model = apply_lora(build("phi3"), LoRAConfig(rank=2, target_modules=["q_proj"]))
    assert apply_lora(model, LoRAConfig(rank=2, target_modules=[r".*\.q_proj"])) is model
    with pytest.raises(ValueError, match="has another LoRA config"):
        apply_lora(model, LoRAConfig(rank=2, target_modules=["v_proj"]))


def test_training_goes_on_from_a_folder_of_slices(tmp_path):
    model = fill(apply_lora(build("gpt2"), LoRAConfig(rank=2, target_modules=[r".*\.(q|v)_proj"])))
    save_adapter(model, tmp_path)
    given = starting_config(build("gpt2"), tmp_path, LoRAConfig(target_modules=["q_proj", "v_proj"]))
    again = apply_lora(build("gpt2"), given)
    assert [layer.spec.slices.names for _, layer in lora_layers(again)] == [("q_proj", "v_proj")] * 2
    with pytest.raises(ValueError, match="target_modules"):
        starting_config(build("gpt2"), tmp_path, LoRAConfig(target_modules=["q_proj"]))
