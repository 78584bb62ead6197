"""A config against a model: what it matches, and applying it twice."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    merge_lora,
    unmerge_lora,
)
from lightning_lora.layers import LoRALayer
from lightning_lora.model.targeting import find_targets
from lightning_lora.utils import patterns
from tests.conftest import snapshot
from tests.faults.kit import CONFIG, adapted, case, net, refused, row

BAD_TARGETS = [
    case(1, "name", {"target_modules": ["q_porj"]}, ("target_modules", "'q_porj' matches no module", "Nearest names: q_proj")),
    case(1, "regex", {"target_modules": r".*\.query"}, ("target_modules", "matches no module", "Nearest names")),
    case(1, "name_as_string", {"target_modules": "q_proj"}, ("'q_proj' matches no module", "regex over the whole name", "['q_proj']")),
    case(1, "part_of_a_name", {"target_modules": ["proj"]}, ("'proj' matches no module", "q_proj")),
    case(2, "one_of_several", {"target_modules": ["q_proj", "k_proj"]}, ("'k_proj' matches no module", "allow_unmatched=True")),
    case(2, "exclude", {"exclude_modules": ["k_proj"]}, ("exclude_modules", "'k_proj' matches no module", "allow_unmatched=True")),
    case(2, "rank_pattern", {"rank_pattern": {"k_proj": 4}}, ("rank_pattern", "'k_proj' matches no module")),
    case(2, "modules_to_save", {"modules_to_save": ["haed"]}, ("modules_to_save", "'haed' matches no module", "head")),
    case(2, "layers", {"layers": [0, 7]}, ("layers=[7]", "indices are 0–1")),
    case(
        11,
        "norm",
        {"target_modules": ["norm"]},
        ("'layers.0.norm'", "torch.nn.modules.normalization.LayerNorm", "supported are", "Linear"),
    ),
    case(11, "container", {"target_modules": ["layers.1"]}, ("'layers.1'", "Block", "cannot adapt", "Embedding")),
    case(11, "among_right_ones", {"target_modules": ["q_proj", "norm"]}, ("'layers.0.norm'", "LayerNorm", "supported are")),
]


@pytest.mark.parametrize(("fields", "said"), BAD_TARGETS)
def test_bad_target(fields: dict[str, Any], said: tuple[str, ...]) -> None:
    model = net()
    with refused(*said, model=model):
        apply_lora(model, config=LoRAConfig(**fields))


@row(2)
def test_the_flag_accepts_it() -> None:
    model = apply_lora(net(), config=LoRAConfig(target_modules=["q_proj", "k_proj"], allow_unmatched=True))
    assert {name for name, m in model.named_modules() if isinstance(m, LoRALayer)} == {"layers.0.q_proj", "layers.1.q_proj"}
    model = net()
    with refused("'k_proj' matches no module", model=model):  # but not where nothing else matches
        apply_lora(model, config=LoRAConfig(target_modules=["k_proj"], allow_unmatched=True))


@row(4)
def test_matching_is_bounded_by_the_number_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A regex that backtracks exponentially in a name's length is tried a fixed number of times a module, and it is documented."""
    tried: list[str] = []
    original = patterns.Pattern.matches
    monkeypatch.setattr(patterns.Pattern, "matches", lambda self, fqn: (tried.append(fqn), original(self, fqn))[1])
    model = net()
    apply_lora(model, config=LoRAConfig(target_modules=[r"(\w+\.?)+proj"]))
    names = [name for name, _ in net().named_modules() if name]
    assert set(tried) == set(names)
    assert len(tried) <= len(names)
    assert "catastrophic" in str(patterns.__doc__)


@row(8)
def test_rank_above_the_layers_own() -> None:
    model = net()
    with pytest.warns(UserWarning, match=r"rank=13 of 'layers\.0\.q_proj' is above min\(in, out\)=12"):
        apply_lora(model, config=LoRAConfig(rank=13, target_modules=["layers.0.q_proj"]))
    assert model.layers[0].q_proj.lora_A.shape == (13, 12)
    apply_lora(net(), config=LoRAConfig(rank=12, target_modules=["layers.0.q_proj"]))  # no warning: those are errors here


@row(11)
def test_a_weight_that_is_read_without_a_call() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with refused("'attention.out_proj'", "NonDynamicallyQuantizableLinear", "MultiheadAttention.forward reads", model=model):
        apply_lora(model, config=LoRAConfig(target_modules=["out_proj"]))


@row(12)
def test_twice() -> None:
    model = adapted()
    before = snapshot(model)
    assert apply_lora(model, config=LoRAConfig(**CONFIG.to_dict())) is model
    assert snapshot(model) == before, "the same config again is a no-op"
    with refused("'layers.0.q_proj'", "rank: 2 != 4", "unload_lora(model)", model=model):
        apply_lora(model, config=LoRAConfig(rank=4, alpha=4, target_modules=["q_proj", "v_proj"]))
    with refused("target_modules", "unload_lora(model)", model=model):
        apply_lora(model, config=LoRAConfig(rank=2, alpha=4, target_modules=["q_proj"]))


@row(13)
def test_after_a_merge() -> None:
    model = merge_lora(adapted())
    with refused("merged", "'layers.0.q_proj'", "unmerge_lora(model)", model=model):
        apply_lora(model, config=CONFIG)
    assert apply_lora(unmerge_lora(model), config=CONFIG) is model


class Router(nn.Linear):
    """A linear by its class, and a router by its place."""


class Mixed(nn.Module):
    """What is matched by accident: a router and a vision tower named like the rest, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(16, 12), nn.Linear(12, 16, bias=False)
        self.lm_head.weight = self.embed.weight
        self.vision = nn.ModuleDict({"q_proj": nn.Linear(12, 12)})
        self.text = nn.ModuleDict({"q_proj": nn.Linear(12, 12), "router": Router(12, 4)})


@row(62)
def test_the_report_shows_what_was_matched_by_accident() -> None:
    """Each by its full name and class, before anything is changed."""
    model = Mixed()
    before = snapshot(model)
    report = find_targets(model, LoRAConfig(rank=2, target_modules=["q_proj", "router", "lm_head"]))
    assert snapshot(model) == before
    lines = {line.split()[0]: line.split()[1] for line in str(report).splitlines() if line.split()[0] in dict(model.named_modules())}
    assert lines == {"vision.q_proj": "Linear", "text.q_proj": "Linear", "text.router": "Router", "lm_head": "Linear"}
