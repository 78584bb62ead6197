"""`combine` and `compress`."""

import json

import pytest
import torch

from lightning_lora import LoRAConfig, apply_lora, save_adapter
from lightning_lora.cli.main import main
from tests.parity.models import base, randomise


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("one", 1), ("two", 2)):
        model = apply_lora(base("llama"), LoRAConfig(rank=4))
        torch.manual_seed(seed)
        randomise(model)
        save_adapter(model, name)


def test_two_adapters_as_one(folders, capsys):
    assert main(["combine", "one=0.7,two=-0.3", "both", "--method", "cat"]) == 0
    assert capsys.readouterr().out == "adapter in both, rank 8\n"
    assert main(["combine", "one=0.7,two=-0.3", "small", "--rank", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"adapter": "small", "ranks": [2], "method": "svd", "made_from": {"one": 0.7, "two": -0.3}}


def test_one_adapter_smaller(folders, capsys):
    assert main(["compress", "one", "small", "--energy", "0.5"]) == 0
    assert capsys.readouterr().out.startswith("adapter in small, rank ")
    assert main(["compress", "one", "small", "--rank", "1"]) == 2
    assert "is not empty; name another folder, or pass --overwrite" in capsys.readouterr().err
    assert main(["combine", "one=1,two=1", "small"]) == 2
    assert "is not empty; name another folder, or pass --overwrite" in capsys.readouterr().err
    assert main(["compress", "one", "small", "--rank", "1", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["combine", "one,two", "out"], "'one' is no folder with a weight; write one=0.7,two=-0.3"),
        (["combine", "one=a,two=1", "out"], "'one=a' is no folder"),
        (["combine", "one=1,one=2", "out"], "'one' is there twice"),
        (["combine", "one=1,three=2", "out"], "three: there is no such adapter folder"),
        (["combine", "one=1,two=2", "out", "--method", "mean"], "method='mean': choose one of"),
        (["compress", "one", "out"], "give one of them"),
    ],
)
def test_wrong_words(words, said, folders, capsys, tmp_path):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
