"""State that training moves beside parameters: an adapter folder has it, or its digest, or a warning says that it has it not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, load_adapter, merge_lora, save_adapter
from lightning_lora.adapter_io.fingerprint import OtherBase
from tests.model.test_noted_state import CONFIG, Model

X = torch.arange(8.0).view(2, 4)


def made(cls: type[nn.Module] = Model) -> Any:
    torch.manual_seed(0)
    return cls()


def trained(model: nn.Module) -> Any:
    """Adapters that do something, and a step in training mode."""
    for parameter in get_lora_parameters(apply_lora(model, CONFIG)):
        parameter.data.fill_(0.1)
    model(X)
    return model.eval()


@pytest.mark.parametrize("merge", [False, True])
def test_a_running_mean_comes_with_the_folder(merge: bool, tmp_path: Path) -> None:
    """Saved again from what was loaded too; PEFT loads it as well."""
    model = trained(made())
    output = model(X)
    save_adapter(merge_lora(model) if merge else model, tmp_path / "one")
    again = load_adapter(made(), tmp_path / "one").eval()
    save_adapter(again, tmp_path / "two")
    for other in (again, load_adapter(made(), tmp_path / "two").eval(), PeftModel.from_pretrained(made(), tmp_path / "one").eval()):
        assert torch.equal(output, other(X)) or torch.allclose(output, other(X), rtol=1e-6)
        assert torch.equal(model.mean, next(buffer for name, buffer in other.named_buffers() if name.endswith("mean")))


def test_statistics_that_were_set_before_are_refused_where_they_differ(tmp_path: Path) -> None:
    model = made()
    model.mean.fill_(1.0)
    folder = save_adapter(apply_lora(model, CONFIG), tmp_path / "a")
    fresh = made()
    with pytest.raises(OtherBase, match=r"the buffer 'mean' had other values where the adapter was trained \(1 of 2 buffers did\): set it"):
        load_adapter(fresh, folder)
    assert type(fresh.up) is nn.Linear
    load_adapter(made(), folder, check_base=False)
    fresh.mean.fill_(1.0)
    assert torch.equal(load_adapter(fresh, folder)(X), model(X))


class Masked(Model):
    """A buffer with infinity that moves."""

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean.clone().index_fill(0, torch.tensor([self.count.item() % 4]), -torch.inf)
        return super().forward(x).nan_to_num()


def test_a_mask_may_hold_infinity(tmp_path: Path) -> None:
    model = trained(made(Masked))
    loaded = load_adapter(made(Masked), save_adapter(model, tmp_path / "a"))
    assert torch.equal(loaded.mean, model.mean) and not model.mean.isfinite().all()


class Counting(Model):
    """Puts a number of its own into its state dict."""

    steps = 0

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return super().state_dict(*args, **kwargs) | {"steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        self.steps = int(state["steps"])
        return super().load_state_dict({name: value for name, value in state.items() if name != "steps"}, *args, **kwargs)


@pytest.mark.parametrize(("cls", "named"), [(Model, "the extra state of 'scaler'"), (Counting, "'steps', which the module's own")])
def test_what_a_folder_cannot_hold_is_said(cls: type[Model], named: str, tmp_path: Path) -> None:
    model = trained(made(cls))
    if cls is Model:
        model.scaler.scale = 2.0
    with pytest.warns(UserWarning, match=rf"a cannot hold {named}.*Load it from a checkpoint of LoRACallback"):
        save_adapter(model, tmp_path / "a")


class Refuses(Model):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)


@pytest.mark.parametrize("state", ["fresh", "adapted", "merged"])
def test_a_load_that_fails_midway_changes_nothing(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoRAConfig(rank=2, target_modules=["up"], modules_to_save=["head"])
    source = apply_lora(made(Refuses), config)
    for parameter in source.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(0.3)
    folder = save_adapter(source, tmp_path / "a")
    model = made(Refuses)
    if state != "fresh":
        apply_lora(model, config)
        model.up.lora_B.data.fill_(0.2)
    if state == "merged":
        merge_lora(model)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    classes = [type(module) for module in model.modules()]

    def fails(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("lightning_lora.adapter_io.save_load.note_brought", fails)
    with pytest.raises(torch.OutOfMemoryError):
        load_adapter(model, folder)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and [type(module) for module in model.modules()] == classes
    assert all(torch.equal(after[name], value) and after[name].requires_grad == flag for name, (value, flag) in before.items())
