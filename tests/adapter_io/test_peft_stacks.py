"""What the JSON says of modules with several weights, and what refuses their files. tests/parity/test_experts.py has PEFT's own folders."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    combine_adapters,
    compress_adapter,
    export_adapter,
    extract_adapter,
    load_adapters,
    save_adapter,
)
from lightning_lora.adapter_io.peft_stacks import Stack, is_stack, targeted_stacks, unstacked
from tests.conftest import fill
from tests.layers.experts import tiny_qwen3_moe
from tests.layers.mixtures import FQN, experts

MODULES = {"a.experts": experts(tiny_qwen3_moe()), "a.q_proj": nn.Linear(2, 2)}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def test_which_modules():
    assert is_stack(MODULES["a.experts"]) and not is_stack(MODULES["a.q_proj"]) and not is_stack(nn.LayerNorm(2))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"r": 4, "lora_alpha": 6}, Stack({"gate_up_proj": 1.5, "down_proj": 1.5}, 4, 6.0)),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, Stack({"gate_up_proj": 3.0, "down_proj": 3.0}, 4, 6.0)),
        ({"r": 4, "lora_alpha": 6, "rank_pattern": {"down_proj": 2}}, Stack({"gate_up_proj": 1.5, "down_proj": 3.0}, 4, 6.0)),
        ({"r": 4, "lora_alpha": 6, "alpha_pattern": {"down_proj": 8}}, Stack({"gate_up_proj": 1.5, "down_proj": 2.0}, 4, 8.0)),
        ({"r": 4, "lora_alpha": 6, "target_parameters": ["down_proj"]}, Stack({"down_proj": 1.5}, 4, 6.0)),
    ],
)
def test_rank_and_alpha_are_those_of_the_weight_with_the_highest_rank(fields, expected):
    assert targeted_stacks({"target_parameters": BOTH} | fields, MODULES) == {"a.experts": expected}
    assert targeted_stacks({"r": 4}, MODULES) == {}


def test_other_tensors_and_checkpoints_pass():
    tensors = {"a.q_proj.lora_A": torch.zeros(1), "a.experts.lora_A_gate_up_proj": torch.zeros(1), "b.lora_A": torch.zeros(1)}
    assert unstacked(tensors, MODULES, {}, None, "f") == tensors


@pytest.mark.parametrize(
    ("names", "stacks", "message"),
    [
        (["lora_A"], {}, "f: 'a.experts': the JSON's target_parameters names no weight of it"),
        (["lora_A"], {"a.experts": Stack({"down_proj": 1.0}, 2, 2.0)}, "f: 'a.experts': down_proj: the file has no pair for it"),
        (
            ["lora_A", "lora_B"],
            {"a.experts": Stack({"down_proj": 1.0}, 2, 2.0)},
            r"down_proj: A \(3, 3\) and B \(3, 3\) are no pair for 8 experts",
        ),
        (["lora_A", "lora_B"], {"a.experts": Stack({"act": 1.0}, 2, 2.0)}, "names its act, which is not a weight of experts"),
    ],
)
def test_what_does_not_fit_is_refused(names, stacks, message):
    with pytest.raises(ValueError, match=message):
        unstacked({f"a.experts.{name}": torch.zeros(3, 3) for name in names}, MODULES, stacks, {"peft_version": "0.21.0"}, "f")


def test_more_pairs_than_weights_are_refused():
    pair = {"lora_A": torch.zeros(16, 16), "lora_B": torch.zeros(32, 16), "lora_A_1": torch.zeros(1)}
    with pytest.raises(ValueError, match="lora_A_1 belongs to no weight that the file targets"):
        unstacked({f"a.experts.{k}": v for k, v in pair.items()}, MODULES, {"a.experts": Stack({"down_proj": 1.0}, 2, 2.0)}, {}, "f")


def test_what_adds_or_compares_matrices_refuses_experts_by_name(tmp_path):
    """Their files have a pair per expert in two tensors, which no sum of two files is."""
    base, config = tiny_qwen3_moe(), LoRAConfig(rank=2, target_modules=["experts"])
    save_adapter(fill(apply_lora(copy.deepcopy(base), config)), tmp_path / "a")
    each = "has a pair for each expert"
    for refused in (
        lambda: combine_adapters({tmp_path / "a": 1.0, tmp_path / "b": 1.0}, tmp_path / "out", method="cat"),
        lambda: compress_adapter(tmp_path / "a", tmp_path / "out", rank=1),
    ):
        save_adapter(apply_lora(copy.deepcopy(base), config), tmp_path / "b", overwrite=True)
        with pytest.raises(ValueError, match=each):
            refused()
    with pytest.raises(ValueError, match=f"{FQN!r} has no single matrix but"):
        extract_adapter(copy.deepcopy(base), tiny_qwen3_moe(), config)
    with pytest.raises(ValueError, match=r"experts.lora_A_down_proj' is more than a low-rank pair"):
        load_adapters(copy.deepcopy(base), {"a": tmp_path / "a"})
    with pytest.raises(ValueError, match=r"an adapter on a tensor of experts \(target_parameters\), which vllm does not load"):
        export_adapter(tmp_path / "a", tmp_path / "out", target="vllm", base="b")
