"""LoRAConfig: every field checked once, immutable, the same after a trip through JSON."""

import dataclasses
import json
import math
import re

import peft
import pytest
import torch

from lightning_lora import LoRAConfig
from lightning_lora.utils.peft_words import OURS


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank", 0, "rank=0: the rank is a whole number ≥ 1"),
        ("rank", -4, "rank=-4"),
        ("rank", 8.0, "rank=8.0"),
        ("rank", True, "rank=True"),
        ("rank", "8", "rank='8'"),
        ("alpha", 0, "alpha=0: alpha is a finite number > 0"),
        ("alpha", -1.0, "alpha=-1.0"),
        ("alpha", math.nan, "alpha=nan"),
        ("alpha", math.inf, "alpha=inf"),
        ("alpha", "16", "alpha='16'"),
        ("dropout", 1, "dropout=1: give a probability in [0, 1)"),
        ("dropout", -0.1, "dropout=-0.1"),
        ("dropout", math.nan, "dropout=nan"),
        ("dropout", None, "dropout=None"),
        ("target_modules", [], "target_modules=() names nothing"),
        ("target_modules", "", "target_modules='' names nothing"),
        ("target_modules", [3], "target_modules: 3 is not a module name"),
        ("target_modules", ["("], "target_modules: '(' is not a valid regex"),
        ("exclude_modules", ["["], "exclude_modules: '[' is not a valid regex"),
        ("modules_to_save", ["*"], "modules_to_save: '*' is not a valid regex"),
        ("modules_to_save", "head", "modules_to_save='head': give a list of names, or 'auto'"),
        ("layers", [], "layers=(): give block indices"),
        ("layers", [-1], "layers=(-1,)"),
        ("layers", [1.0], "layers=(1.0,)"),
        ("layers", "01", "layers='01'"),
        ("bias", "some", "bias='some': choose one of none, all, lora_only"),
        ("scaling", "sqrt", "scaling='sqrt': choose one of standard, rslora"),
        ("rank_pattern", {"q": 0}, "rank_pattern['q']=0: the rank is a whole number"),
        ("rank_pattern", {"(": 4}, "rank_pattern: '(' is not a valid regex"),
        ("alpha_pattern", {"q": -1}, "alpha_pattern['q']=-1: alpha is a finite number"),
        ("alpha_pattern", {"": 1}, "alpha_pattern: '' is not a module name"),
        # Of another type altogether.
        ("layers", 5, "layers=5"),
        ("target_modules", 5, "target_modules"),
        ("target_modules", None, "target_modules=() names nothing"),
        ("exclude_modules", 7, "exclude_modules"),
        ("modules_to_save", 5, "modules_to_save"),
        ("rank_pattern", ["q"], "rank_pattern"),
        ("alpha_pattern", 2, "alpha_pattern"),
        ("kind_pattern", {"q": 4}, "kind_pattern['q']=4: give the name of a registered kind"),
        ("kind_pattern", {"(": "linear"}, "kind_pattern: '(' is not a valid regex"),
        ("kind_pattern", "linear", "kind_pattern='linear': give a mapping from pattern"),
        ("allow_unmatched", "no", "allow_unmatched='no': give True or False"),
        ("variant_options", ["seed"], "variant_options=['seed']: give a mapping from option"),
    ],
)
def test_refusals_name_field_and_value(field, value, message):
    with pytest.raises(ValueError) as error:
        LoRAConfig(**{field: value})
    assert message in str(error.value)


@pytest.mark.parametrize("value", [None, [], ()])
def test_nothing_excluded_nothing_saved(value):
    config = LoRAConfig(exclude_modules=value, modules_to_save=value)
    assert config.exclude_modules == ()
    assert config.modules_to_save == ()


@pytest.mark.parametrize("value", [None, [], (), {}])
def test_no_token_rows(value):
    assert LoRAConfig(trainable_token_indices=value).trainable_token_indices is None


@pytest.mark.parametrize(
    "value", [torch.tensor([1, 2]), torch.tensor([1, 2]).numpy(), {1, 2}, "12", 1], ids=lambda value: type(value).__name__
)
def test_token_rows_are_a_list(value):
    with pytest.raises(ValueError, match=r"trainable_token_indices=.*: give a list of row numbers such as \[32000, 32001\]"):
        LoRAConfig(trainable_token_indices=value)


def test_it_is_immutable_and_owns_its_values():
    rules, names = {"q_proj": 4}, ["q_proj"]
    config = LoRAConfig(rank_pattern=rules, target_modules=names)
    rules["v_proj"] = 2
    names.append("v_proj")
    assert config.rank_pattern == {"q_proj": 4}
    assert config.target_modules == ("q_proj",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 2


def test_numbers_become_floats_so_that_configs_compare():
    config = LoRAConfig(alpha=16, dropout=0, alpha_pattern={"q": 4})
    assert config == LoRAConfig(alpha=16.0, dropout=0.0, alpha_pattern={"q": 4.0})
    assert [type(v) for v in (config.alpha, config.dropout, config.alpha_pattern["q"])] == [float] * 3


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(),
        LoRAConfig(target_modules="all-linear", exclude_modules=["x"], layers=[0, 2], bias="lora_only", scaling="rslora"),
        LoRAConfig(target_modules=r".*q", rank_pattern={"q": 2}, alpha_pattern={"q": 3}, modules_to_save=["head"], init="gaussian"),
        LoRAConfig(rank=4, alpha=1.5, dropout=0.25, variant="plain", allow_unmatched=True, exclude_modules=".*x"),
        LoRAConfig(variant="vera", variant_options={"projection_seed": 3}, kind_pattern={"qkv": "linear"}),
    ],
)
def test_round_trip_through_json(config):
    assert LoRAConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("scaling", "expected"), [("standard", 16 / 4), ("rslora", 16 / 2)])
def test_scaling(scaling, expected):
    assert LoRAConfig(scaling=scaling).scaling_of(4, 16.0) == expected


def test_differences_name_each_field_that_changes_the_adapter():
    lines = LoRAConfig(rank=4).differences(LoRAConfig(rank=8, bias="all", allow_unmatched=True))
    assert lines == ["rank: 4 != 8", "bias: 'none' != 'all'"]
    assert LoRAConfig().differences(LoRAConfig()) == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("r", "PEFT's r is rank here"),
        ("lora_alpha", "PEFT's lora_alpha is alpha here"),
        ("lora_dropout", "PEFT's lora_dropout is dropout here"),
        ("use_dora", "PEFT's use_dora is variant='dora' here"),
        ("use_rslora", "PEFT's use_rslora is scaling='rslora' here"),
        ("init_lora_weights", "PEFT's init_lora_weights is init here"),
        ("task_type", "it is PEFT's; leave it out, the model says it"),
        ("ranks", "did you mean rank?"),
        ("colour", "there are rank, alpha"),
    ],
)
def test_names_of_other_packages_get_a_hint(name, hint):
    for make in (LoRAConfig, lambda **given: dataclasses.replace(LoRAConfig(), **given)):
        with pytest.raises(TypeError, match=f"^LoRAConfig has no field '{name}': {re.escape(hint)}"):
            make(**{name: 8})


def test_hints_are_of_fields_that_are_pefts_and_ours():
    theirs, ours = ({field.name for field in dataclasses.fields(cls)} for cls in (peft.LoraConfig, LoRAConfig))
    assert theirs >= OURS.keys() and not ours & OURS.keys()
    assert all(hint.startswith("leave") or hint.partition("=")[0] in ours for hint in OURS.values())
