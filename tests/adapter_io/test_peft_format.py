"""PEFT's JSON field by field, both ways, without PEFT (tests/parity exchanges folders with it)."""

import json

import pytest
from torch import nn

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.adapter_io.peft_format import from_peft, to_peft
from lightning_lora.model.targeting import find_targets
from lightning_lora.utils.names import modules_by_name
from tests.conftest import TinyModel

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
NAMES = ["layers.0.attn.q_proj.lora_A.weight", "layers.0.attn.q_proj.lora_B.weight"]


def written(model, config):
    apply_lora(model, config=config)
    report_saved = find_targets(model, config).saved
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    modules = [n for n in modules_by_name(model) if "lora_" not in n]
    return json.loads(json.dumps(to_peft(config, layers, report_saved, modules)))


def test_the_fields_of_a_plain_adapter(make):
    fields = written(make(TinyModel), LoRAConfig(rank=4, alpha=8, dropout=0.1, scaling="rslora", bias="lora_only"))
    assert fields == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "lora_only",
        "use_rslora": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    assert isinstance(fields["lora_alpha"], int)  # some readers insist


def test_a_broken_alpha_stays_a_number(make):
    assert written(make(TinyModel), LoRAConfig(alpha=1.5))["lora_alpha"] == 1.5


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["q_proj"]}, ["q_proj"]),
        ({"target_modules": ["attn.q_proj"]}, ["attn.q_proj"]),
        ({"target_modules": ["q_proj"], "layers": [1]}, ["layers.1.attn.q_proj"]),
        ({"target_modules": ["q_proj"], "exclude_modules": ["layers.0.attn.q_proj"]}, ["layers.1.attn.q_proj"]),
        ({"target_modules": r".*\.q_proj"}, ["layers.0.attn.q_proj", "layers.1.attn.q_proj"]),
        ({"target_modules": [r".*\.1\.attn\.(q|v)_proj"]}, ["layers.1.attn.q_proj", "layers.1.attn.v_proj"]),
    ],
)
def test_targets_are_names_that_pefts_matching_takes_for_the_same_layers(make, fields, expected):
    assert written(make(TinyModel), LoRAConfig(**fields))["target_modules"] == expected


def test_patterns_become_one_anchored_entry_a_layer(make):
    config = LoRAConfig(rank=4, rank_pattern={"layers.0.attn.q_proj": 2}, alpha_pattern={"v_proj": 2.5})
    fields = written(make(TinyModel), config)
    assert fields["rank_pattern"] == {r"^layers\.0\.attn\.q_proj": 2}
    assert fields["alpha_pattern"] == {r"^layers\.0\.attn\.v_proj": 2.5, r"^layers\.1\.attn\.v_proj": 2.5}


def test_saved_modules_by_full_name(make):
    fields = written(make(TinyModel), LoRAConfig(modules_to_save=["norm"]))
    assert fields["modules_to_save"] == ["layers.0.norm", "layers.1.norm"]


def test_a_saved_name_that_pefts_matching_would_take_for_another_too():
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "head": nn.Linear(2, 2), "my_head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"modules_to_save: 'head' cannot be saved in PEFT's format, which would take 'my_head'"):
        written(model, LoRAConfig(target_modules=["fc"], rank=2, modules_to_save=["head"]))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"rank": 4, "alpha": 8.0, "target_modules": ("q_proj",), "dropout": 0.0, "bias": "none", "scaling": "standard"}),
        ({"lora_dropout": 0.1, "bias": "all", "use_rslora": True}, {"dropout": 0.1, "bias": "all", "scaling": "rslora"}),
        ({"r": 16, "lora_alpha": 1.5}, {"rank": 16, "alpha": 1.5}),
        ({"modules_to_save": ["head"]}, {"modules_to_save": ("head",)}),
        ({"modules_to_save": None}, {"modules_to_save": ()}),
        ({"layers_to_transform": 3}, {"layers": (3,)}),
        ({"layers_to_transform": [0, 1]}, {"layers": (0, 1)}),
        ({"layers_to_transform": []}, {"layers": None}),
        ({"init_lora_weights": "gaussian"}, {"init": "gaussian"}),
        ({"init_lora_weights": False}, {"init": "kaiming"}),
        ({"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"q_proj": 2}}),
        ({"target_modules": None}, {"target_modules": ("layers.0.attn.q_proj",)}),  # the tensors say it
        ({"use_dora": True}, {"variant": "dora"}),
        ({"lora_bias": True}, {"variant": "lora_bias"}),
        ({"use_dora": False, "lora_bias": False, "layer_replication": None, "target_parameters": []}, {"variant": "plain"}),
        ({"loftq_config": {}, "revision": "main", "task_type": "CAUSAL_LM", "inference_mode": True}, {}),
    ],
)
def test_fields_we_honour_or_may_ignore(fields, expected):
    config = from_peft({**PLAIN, **fields}, "a.json", NAMES)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, r"a\.json: peft_type='IA3'; only LORA"),
        ({"lora_bias": True, "use_dora": True}, r"a\.json: use_dora=True and lora_bias=True .* PEFT does not combine either"),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' trains on a base changed at the start"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config=.* belongs to a base that was changed"),
        ({"r": 0}, "rank=0"),
        ({"bias": "some"}, "bias='some'"),
    ],
)
def test_fields_that_would_make_us_wrong_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        from_peft({**PLAIN, **fields}, "a.json", NAMES)


def test_no_config_at_all():
    with pytest.raises(ValueError, match="peft_type=None"):
        from_peft({}, "a.json", NAMES)


def test_an_unknown_field_is_a_warning():
    with pytest.warns(UserWarning, match=r"a\.json: brand_new=True is not a field we know"):
        from_peft({**PLAIN, "brand_new": True}, "a.json", NAMES)


@pytest.mark.parametrize("fields", [{"trust_remote_code": True}, {"megatron_core": "os"}])
def test_fields_that_name_code_are_never_acted_on(fields):
    with pytest.warns(UserWarning, match="is never acted on: nothing is imported or run"):
        from_peft({**PLAIN, **fields}, "a.json", NAMES)


@pytest.mark.parametrize(
    ("fields", "rank"),
    [
        ({"rank_pattern": {r"layers\.0.*": 2}}, {0: 2, 1: 4}),
        ({"rank_pattern": {r"^layers.1.attn.q_proj": 2}}, {0: 4, 1: 2}),
        ({"rank_pattern": {"attn.q_proj": 1}}, {0: 1, 1: 1}),
    ],
)
def test_pefts_rank_patterns_mean_the_same_here(make, fields, rank):
    report = find_targets(make(TinyModel), from_peft({**PLAIN, **fields}, "a.json", NAMES))
    assert {int(t.fqn.split(".")[1]): t.rank for t in report.targets} == rank


def test_layers_pattern_names_the_list_that_the_index_counts_in():
    model = nn.ModuleDict({name: nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2)]) for name in ("enc", "dec")})
    fields = {**PLAIN, "target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "dec"}
    assert [t.fqn for t in find_targets(model, from_peft(fields, "a.json", NAMES)).targets] == ["dec.1.q"]


def test_there_and_back(make):
    config = LoRAConfig(rank=4, rank_pattern={"v_proj": 2}, alpha_pattern={"layers.0.attn.q_proj": 3}, layers=[0], modules_to_save=["norm"])
    fields = written(make(TinyModel), config)
    mine = {t.fqn: (t.rank, t.alpha) for t in find_targets(make(TinyModel), config).targets}
    back = find_targets(make(TinyModel), from_peft(fields, "a.json", NAMES))
    assert {t.fqn: (t.rank, t.alpha) for t in back.targets} == mine
    assert back.saved == ("layers.0.norm", "layers.1.norm")
