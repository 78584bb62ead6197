"""``make models`` on four architectures, and that it tells right from wrong."""

import pytest
import torch

from lightning_lora import lora_layers
from tests import models
from tests.sweep.archs import names

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' advice on tiny configurations


def test_the_list_is_long():
    assert len(names()) >= 120


@pytest.mark.parametrize("name", ["gpt2", "phi3", "t5", "vit"])
def test_an_architecture_goes_through(name, tmp_path):
    assert models.check(name, tmp_path) == ""


def test_every_outcome_has_its_row(monkeypatch, capsys):
    def check(name, folder):
        if name == "a":
            return "no PEFT"
        raise ValueError("no\nlinear") if name == "b" else AssertionError("wrong")

    monkeypatch.setattr(models, "check", check)
    assert models.main(["a", "b"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["| a | passed | no PEFT |", "| b | refused | no |", "1 passed, 1 refused, 0 failed"]
    assert models.main(["a", "c"]) == 1
    assert capsys.readouterr().out.splitlines()[3:] == ["| c | failed | AssertionError: wrong |", "1 passed, 0 refused, 1 failed"]


def test_a_merge_that_loses_the_update_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "merge_lora", lambda model: [layer.lora_B.data.zero_() for _, layer in lora_layers(model)])
    with pytest.raises(AssertionError, match="the merged model differs by"):
        models.check("gpt2", tmp_path)


def test_a_changed_bit_of_the_base_is_seen(monkeypatch, tmp_path):
    def unmerge(model):
        next(parameter for parameter in model.parameters() if not parameter.requires_grad).data.view(-1)[0] += torch.tensor(1.0)

    monkeypatch.setattr(models, "unmerge_lora", unmerge)
    with pytest.raises(AssertionError, match="unmerging is not exact"):
        models.check("gpt2", tmp_path)
