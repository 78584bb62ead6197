"""The probe: any batch, any outputs, the same model afterwards; and what it refuses to compare."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import merge_lora
from lightning_lora.model.probe import probe_merge
from tests.conftest import ALL, TinyModel, adapted, snapshot

IDS = torch.tensor([[1, 2, 3], [4, 5, 10]])


@dataclass
class Output:
    logits: Tensor
    hidden: list[Tensor]
    labels: Tensor
    loss: Tensor | None = None


Pair = namedtuple("Pair", "first second")


@pytest.fixture
def model(make: Any) -> nn.Module:
    return adapted(make(TinyModel).bfloat16(), **ALL)


@pytest.mark.parametrize("probe", [IDS, (IDS,), [IDS], {"ids": IDS}, lambda model: model(IDS)], ids=["x", "tuple", "list", "dict", "call"])
def test_any_batch(model: nn.Module, probe: Any) -> None:
    assert probe_merge(model, probe) == probe_merge(model, IDS)


@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (lambda y: Output(y, [y, 2 * y], y.argmax(-1)), ["logits", "hidden.0", "hidden.1"]),
        (lambda y: {"a": {"b": y}, "c": y.argmax(-1)}, ["a.b"]),
        (lambda y: (y, (y, None, 3)), ["0", "1.0"]),
        (lambda y: Pair(y, y), ["0", "1"]),
        (lambda y: torch.view_as_complex(y[..., :2].float().contiguous()), ["output"]),
    ],
    ids=["dataclass", "dict", "tuple", "namedtuple", "complex"],
)
def test_any_output(model: nn.Module, wrap: Any, names: list[str]) -> None:
    found = probe_merge(model, lambda model: wrap(model(IDS)))
    assert list(found) == names and all(difference.max_abs > 0 for difference in found.values())


def test_the_same_in_evaluation_mode_with_the_same_random_numbers(model: nn.Module) -> None:
    """Dropout is off, noise of the model's own is equal; the modes, and the random numbers that follow, stay."""
    model.train()
    model.layers[0].eval()
    before, state = snapshot(model), torch.get_rng_state()
    noisy = probe_merge(model, lambda model: model(IDS) + torch.randn(2, 3, 11) + float(model.training))
    assert noisy["output"].max_abs == pytest.approx(probe_merge(model, IDS)["output"].max_abs, rel=0.1)
    assert snapshot(model) == before and torch.equal(torch.get_rng_state(), state)


def test_masks_of_infinity_are_compared_as_equal(model: nn.Module) -> None:
    masked = probe_merge(model, lambda model: model(IDS).index_fill(-1, torch.tensor([0]), -torch.inf))
    assert 0 < masked["output"].max_relative < 0.1
    assert probe_merge(model, lambda model: model(IDS) * 0)["output"].max_relative == 0


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (lambda model: model(IDS) * torch.nan, "the output 'output' holds NaN or infinity"),
        (lambda model: model(IDS).argmax(-1), "the model returned no tensor of floating-point numbers"),
        (lambda model: model(IDS)[: 1 + model.lm_head.in_features * model.embed.merged], "has shape"),
        (lambda model: {"merged" if model.embed.merged else "not": model(IDS)}, r"the outputs are \['not'\] unmerged"),
        (lambda model: 1 / 0, "division by zero"),
        (torch.tensor([99]), "index out of range"),
    ],
    ids=["nan", "integers", "shapes", "names", "raises", "batch"],
)  # fmt: skip
def test_what_cannot_be_compared_changes_nothing(model: nn.Module, probe: Any, message: str, merged: bool) -> None:
    if merged:
        merge_lora(model)
    before = snapshot(model)
    with pytest.raises((ValueError, ZeroDivisionError, IndexError), match=message):
        probe_merge(model, probe)
    assert snapshot(model) == before


def test_a_module_without_forward_needs_a_function(model: nn.Module) -> None:
    module = nn.ModuleDict({"net": model})
    with pytest.raises(ValueError, match=r'ModuleDict.* is missing the required "forward" function\. Pass a function'):
        probe_merge(module, IDS)
    assert probe_merge(module, lambda module: module["net"](IDS))


def test_a_merge_without_a_way_back_has_nothing_to_compare_with(model: nn.Module) -> None:
    merge_lora(model, reversible=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'embed' cannot be unmerged: no undo record was kept"):
        probe_merge(model, IDS)
    assert snapshot(model) == before
