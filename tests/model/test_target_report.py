"""What the report of targets counts, explains and says of what "all-linear" leaves out."""

import pytest

from lightning_lora import LoRAConfig, apply_lora, find_targets
from tests.conftest import ConvNet, TinyModel
from tests.layers.experts import tiny_qwen3_moe

QWEN3 = "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts"


def test_the_report_counts_and_explains(make):
    model = make(TinyModel)
    config = LoRAConfig(
        target_modules=["q_proj", "mlp"], rank=4, rank_pattern={"mlp": 2}, exclude_modules=["layers.1.mlp"], modules_to_save=["lm_head"]
    )
    report = find_targets(model, config)
    assert report.parameters == 2 * 4 * 16 + 2 * 16
    assert [(t.shape, t.parameters, t.type_name) for t in report.targets][:1] == [((8, 8), 64, "Linear")]
    assert report.hits == {
        "target_modules": {"q_proj": 2, "mlp": 2},
        "exclude_modules": {"layers.1.mlp": 1},
        "rank_pattern": {"mlp": 1},
    }
    apply_lora(model, config=config)
    assert report.parameters == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    text = str(report)
    assert text.splitlines()[0].split() == ["module", "type", "weight", "rank", "alpha", "count", "parameters"]
    assert text.splitlines()[1].split() == ["layers.*.attn.q_proj", "Linear", "8×8", "4", "16", "2", "128"]
    assert text.splitlines()[2].split() == ["layers.*.mlp", "Linear", "8×8", "2", "16", "1", "32"]
    assert "LoRA on 3 modules, 160 parameters" in text
    assert "target_modules 'q_proj': 2 modules" in text
    assert "exclude_modules 'layers.1.mlp': 1 module" in text
    assert text.splitlines()[-1] == "trained in full: lm_head"


def test_the_report_names_the_type_before_the_swap_and_convolutions():
    model = ConvNet()
    report = find_targets(model, LoRAConfig(target_modules=["conv", "head"], rank=2))
    assert [(t.type_name, t.shape) for t in report.targets] == [("Conv2d", (4, 3, 3, 3)), ("Linear", (2, 4))]
    apply_lora(model, config=LoRAConfig(target_modules=["conv", "head"], rank=2))
    assert [t.type_name for t in report.targets] == ["Conv2d", "Linear"]


def test_named_targets_say_that_experts_are_left_out():
    model = tiny_qwen3_moe()
    (line,) = [line for line in str(find_targets(model, LoRAConfig(target_modules=["q_proj"]))).splitlines() if "left out" in line]
    assert line.startswith("left out: model.layers.*.mlp.experts (Qwen3MoeExperts), 24,576 elements")
    for fields in ({"target_modules": ["experts"]}, {"target_modules": ["q_proj"], "exclude_modules": ["experts"]}):
        assert "left out" not in str(find_targets(model, LoRAConfig(**fields)))


@pytest.mark.parametrize("name", ["gate_proj", "down_proj", "experts.gate_up_proj"])
def test_a_projection_of_the_experts_is_answered_by_their_name(name):
    with pytest.raises(ValueError, match=r"(?s)matches no module.*'model.layers.\*.mlp.experts' holds .*target it by 'experts'"):
        find_targets(tiny_qwen3_moe(), LoRAConfig(target_modules=[name]))


# What "all-linear" leaves out.


def test_all_linear_takes_experts_and_says_what_it_reaches():
    model = tiny_qwen3_moe()
    report = find_targets(model, LoRAConfig(target_modules="all-linear"))
    assert [target.type_name for target in report.targets].count("Qwen3MoeExperts") == 2 and report.passed_over == {}
    assert report.total == sum(p.numel() for p in model.parameters()) == 35_520
    assert report.reached == 24_576 + 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32)
    assert f"reached: {report.reached:,} of 35,520 elements of the model, 86%" in str(report)
    assert report.left_out == {"model.layers.*.mlp.gate (Qwen3MoeTopKRouter)": 512}


@pytest.mark.parametrize("variant", ["dora", "adalora", "vera"])
def test_what_all_linear_leaves_out_is_said(variant):
    """Variants that experts have no place for adapt the linears around them."""
    model, config = tiny_qwen3_moe(), LoRAConfig(target_modules="all-linear", variant=variant)
    with pytest.warns(
        UserWarning, match=r"leaves out 71% of the model, .* model.layers.\*.mlp.experts \(Qwen3MoeExperts\) has 24,576 of 35,520"
    ) as warned:
        report = find_targets(model, config)
    assert f"Passed over: 'model.layers.*.mlp.experts' ({QWEN3}): gate_up_proj: variant='{variant}'" in (text := str(warned[0].message))
    assert text.endswith("Name it in exclude_modules if this is intended."), text
    assert report.left_out == {"model.layers.*.mlp.experts (Qwen3MoeExperts)": 24_576, "model.layers.*.mlp.gate (Qwen3MoeTopKRouter)": 512}
    assert "left out: model.layers.*.mlp.experts (Qwen3MoeExperts), 24,576 elements, 69% of the model" in str(report)
    assert f"passed over: model.layers.*.mlp.experts (2): 'model.layers.*.mlp.experts' ({QWEN3}): gate_up_proj: variant='{variant}'" in str(
        report
    )
    apply_lora(model, config=LoRAConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="of 35,520 elements"):  # of the base, not of the adapters on it
        assert find_targets(model, config).left_out == report.left_out


def test_what_is_left_out_on_purpose_is_no_news():
    model = tiny_qwen3_moe()
    report = find_targets(model, LoRAConfig(target_modules="all-linear", exclude_modules=["experts"]))  # warnings are errors here
    assert list(report.left_out) == ["model.layers.*.mlp.gate (Qwen3MoeTopKRouter)"]


def test_embeddings_heads_and_norms_are_not_left_out(make):
    assert find_targets(make(), LoRAConfig(target_modules="all-linear")).left_out == {}
