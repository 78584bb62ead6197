"""A rank above the sizes of a matrix that has an adapter of its own: a layer's, a group's, a slice's or an expert's."""

import warnings

import pytest
from torch import nn

from lightning_lora import LoRAConfig, find_targets
from tests.layers import fused
from tests.layers.experts import tiny_qwen3_moe

SHARED = {"kind_options": {"experts": {"shared_outer": True}}}
CASES = {
    # Two channels a group in and out; the rank is divided among the groups.
    "conv": (lambda: nn.ModuleDict({"a": nn.Conv2d(8, 8, 1, groups=4)}), {"target_modules": ["a"]}, 8, ", 3 in each of its 4 groups,", 2),
    "experts": (tiny_qwen3_moe, {"target_modules": ["experts"]}, 16, "", 16),
    "shared experts": (tiny_qwen3_moe, {"target_modules": ["experts"], **SHARED}, 16, "", 16),
    "slices": (lambda: fused.build("phi3"), {"target_modules": ["q_proj", "k_proj"]}, 16, "", 16),  # k has half of q's rows
    "one slice": (lambda: fused.build("phi3"), {"target_modules": ["q_proj"]}, 32, "", 32),
}


@pytest.mark.parametrize(("build", "fields", "highest", "split", "size"), CASES.values(), ids=CASES)
def test_the_highest_rank_passes_and_the_next_is_a_warning(build, fields, highest, split, size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_targets(build(), LoRAConfig(rank=highest, **fields))
    above = highest + 4 if split else highest + 1
    with pytest.warns(UserWarning, match=rf"rank={above} of '.*'{split} is above min\(in, out\)={size}: more parameters than a full"):
        find_targets(build(), LoRAConfig(rank=above, **fields))
