"""A frozen copy of a part that trains is adapted with it: its adapters begin as the original's, and user code moves them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, find_targets, get_lora_parameters, load_adapter, merge_lora, save_adapter, unmerge_lora
from lightning_lora.model.frozen_parts import asleep, plain_copies

CONFIG = LoRAConfig(rank=2, target_modules=["up", "down"])
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)).relu())


class Average(nn.Module):
    """As ``AveragedModel`` holds the copy: under another name, beside a counter."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.module = part


def pair(wrap: type[nn.Module] | None = None) -> nn.ModuleDict:
    torch.manual_seed(0)
    online = Part()
    target = copy.deepcopy(online)
    return nn.ModuleDict({"online": online, "target": (wrap(target) if wrap else target).requires_grad_(False)})


@pytest.mark.parametrize(("wrap", "name"), [(None, "target"), (Average, "target.module")])
@pytest.mark.parametrize("variant", ["plain", "dora", "vera"])
def test_a_copy_begins_as_its_original_and_does_not_train(wrap: type[nn.Module] | None, name: str, variant: str) -> None:
    model = pair(wrap)
    config = LoRAConfig(rank=2, target_modules=["up", "down"], variant=variant)
    assert f"frozen: {name}, a copy of online" in str(find_targets(model, config))
    apply_lora(model, config)
    theirs = dict(model.online.named_parameters())
    for own, parameter in model.get_submodule(name).named_parameters():
        assert torch.equal(parameter, theirs[own]) and not parameter.requires_grad
    assert any(p.requires_grad for p in theirs.values()) and not asleep(model)


def test_an_average_by_pairs_is_that_of_the_adapters(tmp_path) -> None:
    model = apply_lora(pair(), CONFIG)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    average = {name: p.detach().double() for name, p in model.online.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        (model.online(X) - model.target(X + 0.1).detach() + 1).square().mean().backward()
        optimizer.step()
        for mine, theirs in zip(model.target.parameters(), model.online.parameters(), strict=True):
            mine.data.mul_(0.9).add_(theirs.data, alpha=0.1)
        average = {name: 0.9 * average[name] + 0.1 * p.detach().double() for name, p in model.online.named_parameters()}
    for name, p in model.target.named_parameters():
        torch.testing.assert_close(p.double(), average[name], rtol=1e-5, atol=1e-6)
    output, base = model.target(X), {name: p.clone() for name, p in model.named_parameters() if "lora" not in name}
    again = load_adapter(pair(), save_adapter(model, tmp_path / "a"))
    assert torch.equal(again.target.up.lora_B, model.target.up.lora_B) and model.target.up.lora_B.abs().sum() > 0
    torch.testing.assert_close(merge_lora(model).target(X), output)
    unmerge_lora(model)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in base.items())


def test_a_target_network_is_loaded_from_the_adapted_one() -> None:
    model = apply_lora(pair(), CONFIG)
    for parameter in get_lora_parameters(model.online):
        parameter.data.fill_(0.1)
    model.target.load_state_dict(model.online.state_dict())
    assert torch.equal(model.target(X), model.online(X))


@pytest.mark.parametrize("options", [{"init": "pissa"}, {"init": "eva"}, {"variant": "adalora"}, {"modules_to_save": ["target.norm"]}])
def test_what_would_tell_the_two_apart_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="in 'target', which is frozen as a whole"):
        apply_lora(pair(), LoRAConfig(rank=2, target_modules=["up", "down"], **options))


def test_what_trains_in_full_and_rows_are_those_of_the_original() -> None:
    """A copy that lacks the original's rows could not follow by pairs."""
    report = find_targets(pair(), LoRAConfig(rank=2, target_modules=["up"], modules_to_save=["norm"]))
    assert report.saved == ("online.norm", "target.norm") and "trained in full: online.norm\n" in f"{report}\n"
    model = pair()
    for part in model.values():
        part.rows = nn.Embedding(3, 4, _weight=torch.ones(3, 4)).requires_grad_(part is model.online)
    apply_lora(copy.deepcopy(model), LoRAConfig(rank=2, target_modules=["up"], trainable_token_indices={"rows": [1]}))
    with pytest.raises(ValueError, match="in 'target', which is frozen as a whole"):
        apply_lora(model, LoRAConfig(rank=2, target_modules=["up"], trainable_token_indices={"online.rows": [1]}))


def test_other_weights_are_no_copy() -> None:
    model = pair()
    model.target.norm.bias += 1
    with pytest.raises(ValueError, match=r"An? part that your code moves after the other .* has to be a copy with equal weights by then"):
        apply_lora(model, CONFIG)


def test_copies_without_adapters_are_found() -> None:
    model = pair(Average)
    apply_lora(model.online, CONFIG)
    assert plain_copies(model) == {"target.module": "online"}
    assert plain_copies(apply_lora(pair(), CONFIG)) == {}


def test_adapters_that_were_frozen_later_are_found() -> None:
    model = apply_lora(nn.ModuleDict({"body": Part(), "up": nn.Linear(4, 4)}), CONFIG)
    assert asleep(model) == []
    model.body.requires_grad_(False)
    assert asleep(model) == ["body.up", "body.down"]
