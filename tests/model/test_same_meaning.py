"""A config that says in other words what a model has is applied already: a loaded adapter has its file's words."""

import pytest

from lightning_lora import LoRAConfig, apply_lora
from tests.conftest import TinyModel, adapted, snapshot

HAS = {"target_modules": ["q_proj", "v_proj"], "rank": 4, "modules_to_save": ["norm"]}


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["v_proj", "q_proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": [f"^layers.{i}.attn.{name}_proj$" for i in (0, 1) for name in "qv"]},
        {"rank": 8, "rank_pattern": {"q_proj": 4, "v_proj": 4}},
        {"alpha": 1.0, "alpha_pattern": {"q_proj": 16.0, "v_proj": 16.0}},
        {"target_modules": ["q_proj", "v_proj", "mlp"], "exclude_modules": ["mlp"]},
        {"layers": [0, 1]},
        {"modules_to_save": ["layers.0.norm", "layers.1.norm"]},
        {"modules_to_save": "auto"},
        {"init": "gaussian"},
        {"allow_unmatched": True},
    ],
    ids=str,
)
def test_other_words(make, fields):
    model = adapted(make(TinyModel), **HAS)
    before = snapshot(model)
    assert apply_lora(model, LoRAConfig(**HAS | fields)) is model
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj"]}, r"target_modules: \('q_proj', 'v_proj'\) != \('q_proj',\)"),
        ({"target_modules": ["q_proj", "v_proj", "mlp"]}, "target_modules"),
        ({"layers": [0]}, r"layers: None != \(0,\)"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"modules_to_save": ["layers.0.norm"]}, "modules_to_save"),
        ({"dropout": 0.1}, r"dropout: 0\.0 != 0\.1"),
        ({"scaling": "rslora"}, "scaling"),
        ({"bias": "all"}, "bias"),
        ({"variant": "dora"}, "variant"),
        ({"init": "pissa"}, "init"),
    ],
    ids=str,
)
def test_another_meaning(make, fields, message):
    model = adapted(make(TinyModel), **HAS)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"has another LoRA config \({message}"):
        apply_lora(model, LoRAConfig(**HAS | fields))
    assert snapshot(model) == before
