"""``save_pretrained`` of an adapted model would write a file that loads as the base: it raises, and only then."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, load_adapter, merge_lora, save_adapter, unload_lora, unmerge_lora
from lightning_lora.layers.base import lora_layers
from tests import tiny_lm
from tests.conftest import fill

IDS = torch.tensor([[2, 5, 9, 3]])
REFUSED = r"(?s)q_proj.*export_merged\(model, folder\).*save_adapter\(model, folder\).*merge_lora\(model\)"


def model() -> nn.Module:
    return fill(apply_lora(tiny_lm.llama().eval(), LoRAConfig(rank=2, target_modules=["q_proj"])))


COPIES = {
    "itself": lambda model: model,
    "deep copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "inner model": lambda model: model.model,
    "wrapped": lambda model: nn.Sequential(model)[0],
}


@pytest.mark.parametrize("how", COPIES)
def test_it_is_refused_and_writes_nothing(how: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=REFUSED):
        COPIES[how](model()).save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_loading_an_adapter_guards_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=REFUSED):
        load_adapter(tiny_lm.llama(), save_adapter(model(), tmp_path / "adapter")).save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("how", ["itself", "deep copy", "pickle"])
def test_a_merged_model_saves_and_loads(how: str, tmp_path: Path) -> None:
    adapted = model()
    wanted = adapted(IDS).logits
    merged = merge_lora(COPIES[how](adapted))
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(type(adapted).from_pretrained(tmp_path / "merged")(IDS).logits, wanted)
    unmerge_lora(merged)
    with pytest.raises(ValueError, match=REFUSED):
        merged.save_pretrained(tmp_path / "unmerged")


def test_one_layer_that_is_not_merged_is_enough(tmp_path: Path) -> None:
    merged = merge_lora(model())
    list(lora_layers(merged))[1][1].unmerge_weights()
    with pytest.raises(ValueError, match=r"layers.1.*and 0 more have adapters"):
        merged.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("how", ["itself", "deep copy", "pickle"])
@pytest.mark.parametrize("kept", [False, True])
def test_unloading_takes_the_guard_away(how: str, kept: bool, tmp_path: Path) -> None:
    adapted = COPIES[how](model())
    plain = unload_lora(merge_lora(adapted), merged="keep") if kept else unload_lora(adapted)
    assert not any("save_pretrained" in module.__dict__ for module in plain.modules())
    plain.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(type(plain).from_pretrained(tmp_path / "out")(IDS).logits, plain(IDS).logits)


def test_an_explicit_state_dict_counts_for_what_it_holds(tmp_path: Path) -> None:
    adapted = model()
    with pytest.raises(ValueError, match=REFUSED):
        adapted.save_pretrained(tmp_path / "out", state_dict=adapted.state_dict())
    adapted.save_pretrained(tmp_path / "base", state_dict=tiny_lm.llama().state_dict())


def test_a_failed_start_leaves_no_guard() -> None:
    plain = tiny_lm.llama()
    with pytest.raises(ValueError, match="matches no module"):
        apply_lora(plain, LoRAConfig(target_modules=["q_proj", "no_such"]))
    assert not any("save_pretrained" in module.__dict__ for module in plain.modules())


class HubModel(nn.Module, PyTorchModelHubMixin):
    """A plain module with the hub's mixin, whose ``from_pretrained`` passes over unknown keys by default, as diffusers' does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


def test_models_of_the_hub_and_of_diffusers_are_guarded_too(tmp_path: Path) -> None:
    hub = fill(apply_lora(HubModel(), LoRAConfig(rank=2, target_modules=["layer"])))
    with pytest.raises(ValueError, match=r"(?s)'layer' and 0 more.*export_merged"):
        hub.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    y = hub.layer(torch.ones(4))
    merge_lora(hub).save_pretrained(tmp_path / "out")
    torch.testing.assert_close(HubModel.from_pretrained(tmp_path / "out").layer(torch.ones(4)), y)


def test_the_guard_takes_the_options_of_the_method() -> None:
    """Pipelines of diffusers pass on only the options that the method's signature has."""
    options = inspect.signature(type(model()).save_pretrained).parameters
    assert inspect.signature(model().save_pretrained).parameters.keys() >= options.keys() - {"self"}


class OwnModel(nn.Module):
    """No model of transformers, with a method of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def save_pretrained(self, folder: Path) -> str:
        return f"mine in {folder}"


def test_other_models_are_not_touched() -> None:
    other = apply_lora(OwnModel(), LoRAConfig(rank=2, target_modules=["layer"]))
    assert other.save_pretrained("x") == "mine in x" and "save_pretrained" not in other.__dict__


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adapted, self.beside = tiny_lm.llama(), tiny_lm.llama()


def test_a_model_beside_the_adapted_one_is_not_touched(tmp_path: Path) -> None:
    both = apply_lora(Both(), LoRAConfig(target_modules=["adapted.*.q_proj"]))
    both.beside.save_pretrained(tmp_path / "beside")
    with pytest.raises(ValueError, match="save_pretrained"):
        both.adapted.save_pretrained(tmp_path / "adapted")


def test_a_chain_of_calls_saves(tmp_path: Path) -> None:
    """The method keeps its model alive, as any method does."""
    unload_lora(merge_lora(model()), merged="keep").save_pretrained(tmp_path / "plain")
    merge_lora(model()).save_pretrained(tmp_path / "merged")
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (tmp_path / "merged/model.safetensors").read_bytes()
