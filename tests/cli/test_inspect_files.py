import json
from pathlib import Path

import pytest
import torch
import transformers

from lightning_lora.cli.main import main
from lightning_lora.strategies.checkpoint_io import write_folder
from tests.tasks import tiny


def test_inspect_a_model_reads_no_weights(model, tmp_path, capsys):
    folder = tmp_path / "config-only"
    folder.mkdir()
    (folder / "config.json").write_bytes(Path(model, "config.json").read_bytes())
    options = ["--lora.rank=4", "--lora.target_modules=all-linear"]
    assert main(["inspect", str(folder), *options]) == 0
    assert "LoRA on 14 modules" in capsys.readouterr().out
    assert main(["inspect", str(folder), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["targets"]) == 14 and found["targets"][0]["rank"] == 4
    assert found["adapter_parameters"] < found["parameters"]


def test_inspect_an_adapter_shows_its_config_and_groups_its_tensors(adapter, model, capsys):
    assert main(["inspect", adapter]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["rank", "4"] in lines and ["parameters", "896"] in lines and ["base", model] in lines
    assert ["model.layers.*.self_attn.q_proj.lora_A", "(4,", "32)", "float32", "2"] in lines
    assert main(["inspect", adapter, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 896 and found["config"]["rank"] == 4 and found["base"] == model
    assert found["tensors"]["model.layers.0.self_attn.q_proj.lora_A"] == {"shape": [4, 32], "dtype": "float32"}


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_inspect_a_checkpoint(config, tmp_path, capsys):
    assert main(["fit", "--config", config, "--trainer.limit_train_batches=1"]) == 0
    (checkpoint,) = (tmp_path / "run").glob("checkpoints/*.ckpt")
    capsys.readouterr()
    assert main(["inspect", str(checkpoint)]) == 0
    assert ["rank", "2"] in [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_inspect_a_full_fine_tunes_checkpoint(config, model, tmp_path, capsys):
    assert main(["fit", "--config", config, "--full_finetuning=true", "--trainer.max_steps=1"]) == 0
    (checkpoint,) = (tmp_path / "run").glob("checkpoints/*.ckpt")
    capsys.readouterr()
    assert main(["inspect", str(checkpoint)]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "all weights of a full fine-tune, no adapter" in shown and "AutoModelForCausalLM" in shown
    assert f"lightning-lora merge MODEL {checkpoint} OUT" in shown and "model.model.layers.*.self_attn.q_proj.weight" in shown
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    whole = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert found["step"] == 1 and found["parameters"] == sum(tensor.numel() for tensor in whole.state_dict().values())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("folder", [False, True])
def test_inspect_a_checkpoint_of_another_module(folder, tmp_path, capsys):
    path = tmp_path / "other.ckpt"
    content = {"state_dict": {"net.0.weight": torch.zeros(3, 2), "net.1.weight": torch.zeros(3, 2)}, "global_step": 7}
    write_folder(content, path) if folder else torch.save(content, path)
    assert main(["inspect", str(path)]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "a module's weights, no adapter" in shown and "merge" not in shown
    assert ["net.*.weight", "(3,", "2)", "float32", "2"] in [line.split() for line in shown.splitlines()]
    torch.save({"epoch": 1}, tmp_path / "none.ckpt")
    assert main(["inspect", str(tmp_path / "none.ckpt")]) == 2
    assert "none.ckpt holds neither an adapter nor weights" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:target_modules=.all-linear. leaves out")
def test_a_model_of_any_class_is_shown_without_options(tmp_path, capsys):
    """By the class that wrote it: a classifier, an image model and an encoder with decoder."""
    torch.manual_seed(0)
    head = transformers.BertForSequenceClassification(tiny.bert().config)
    head.save_pretrained(tmp_path / "classifier")
    for folder in (str(tmp_path / "classifier"), tiny.save(tmp_path / "vit", "vit"), tiny.save(tmp_path / "t5", "t5")):
        assert main(["inspect", folder]) == 0, capsys.readouterr().err
        assert "LoRA on " in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "classifier"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == head.num_parameters()
