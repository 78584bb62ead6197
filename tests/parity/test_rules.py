"""Which modules a JSON means: our port of PEFT's matching against PEFT's own functions, on names made to trip it."""

import itertools

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lightning_lora.adapter_io.peft_rules import is_target, pattern_value

NAMES = [
    *("q_proj", "layers.0.q_proj", "model.layers.0.q_proj", "model.layers.1.mlp.experts.0.q_proj", "enc.layers.1.my_q_proj"),
    *("model.layers.10.q_proj", "head", "my_head", "model.head.q_proj", "model.layers.0", "dec.block.1.layers.0.q_proj"),
]
TARGETS = [
    ["q_proj"],
    ["layers.0.q_proj", "q_proj"],
    ["model.layers.0.q_proj", "0.q_proj"],
    r".*\.q_proj",
    "q_proj",
    r"model\.layers\.\d+\.q_proj",
]
OTHERS = [
    {},
    {"layers_to_transform": 0},
    {"layers_to_transform": [0, 1]},
    {"layers_to_transform": []},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"layers_to_transform": [0, 1], "layers_pattern": ["block", "layers"]},
    {"exclude_modules": ["layers.0.q_proj"]},
    {"exclude_modules": r".*\.1\..*"},
    {"modules_to_save": ["head"]},
    {"modules_to_save": ["layers.0", "my_h.*"]},
]


@pytest.mark.parametrize("others", OTHERS, ids=str)
def test_targets(others):
    for targets in TARGETS:
        if isinstance(targets, str) and "layers_to_transform" in others:
            continue  # PEFT refuses the two together
        fields = {"target_modules": targets, **others}
        config = LoraConfig(**fields)
        for name in NAMES:
            assert is_target(fields, name) == bool(check_target_module_exists(config, name)), (fields, name)


def test_patterns():
    keys = ["q_proj", "proj", "0.q_proj", r"layers\.\d+\.q_proj", "^model.layers.0.q_proj", "^q_proj$", "q_proj|head", "model.*"]
    for pair in itertools.permutations(keys, 2):
        patterns = {key: index for index, key in enumerate(pair)}
        for name in NAMES:
            assert pattern_value(patterns, name, None) == patterns.get(get_pattern_key(patterns.keys(), name))
