"""`lightning-lora export` through its entry point."""

import json
from pathlib import Path

import torch
import transformers

from lightning_lora import load_adapter
from lightning_lora.cli.export import run_of
from lightning_lora.cli.main import main


def test_an_adapter_for_a_server(model, adapter, tmp_path, capsys):
    out = tmp_path / "served"
    assert main(["export", adapter, str(out), "--for", "vllm"]) == 0
    assert capsys.readouterr().out == f"adapter for vllm in {out}; {out / 'README.md'} says how to load it\n"
    fields = json.loads((out / "adapter_config.json").read_text())
    assert fields["r"] == 8 and fields["base_model_name_or_path"] == model and fields["task_type"] == "CAUSAL_LM"
    assert "--max-lora-rank 8 " in (out / "README.md").read_text()
    ids = torch.arange(4, 14)[None]
    with torch.no_grad():
        ours, theirs = (
            load_adapter(transformers.AutoModelForCausalLM.from_pretrained(model), folder)(ids).logits for folder in (out, adapter)
        )
    torch.testing.assert_close(ours, theirs)
    assert main(["export", adapter, str(out), "--for=llama.cpp", "--base=owner/name", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"adapter": str(out), "target": "llama.cpp", "made_from": adapter}
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/name"


def test_a_checkpoint_with_what_its_run_tells(model, config, tmp_path, capsys):
    assert main(["fit", "--config", config, "--trainer.log_every_n_steps=1"]) == 0
    (checkpoint,) = (tmp_path / "run").glob("checkpoints/*.ckpt")
    capsys.readouterr()
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--for", "sglang"]) == 2
    assert "is a checkpoint; give --base, the model that it was trained on" in capsys.readouterr().err
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--for", "sglang", "--base", model]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Trained on: {tmp_path / 'train.jsonl'}" in card and "| val_loss |" in card


def test_wrong_input_is_one_line(adapter, tmp_path, capsys):
    for arguments, code, words in (
        (
            [adapter, "out", "--for", "vlm"],
            2,
            "for: expected one of 'peft', 'vllm', 'sglang', 'llama.cpp', 'diffusers', got vlm; did you mean",
        ),
        ([adapter, "out", "--four", "vllm"], 2, "no option 'four'"),
        ([str(tmp_path / "none"), "out"], 2, "there is no such adapter folder or checkpoint"),
        ([adapter, adapter], 2, "is not empty; name another folder, or pass --overwrite"),
        ([adapter, "out", "--for", "diffusers"], 2, "component is not set"),
    ):
        assert main(["export", *arguments]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert not Path("out").exists()


def test_files_that_are_no_runs_say_nothing(tmp_path):
    (tmp_path / "metrics.csv").write_text("name,val_loss\nx,high\n")
    for text in ("data: train.jsonl\n", "- a\n", "x: !!python/object:os.system {}\n", "data: {other: 1}\n", ""):
        (tmp_path / "config.yaml").write_text(text)
        assert run_of(tmp_path / "adapter") == (None, {})
    (tmp_path / "config.yaml").write_text("data: {class_path: x, init_args: {train: rows.jsonl}}\n")
    (tmp_path / "metrics.csv").write_text("epoch,step,train_loss,val_loss\n0,1,3,\n0,2,,2.5\n1,4,,1.5\n")
    assert run_of(tmp_path / "checkpoints" / "last.ckpt") == ("rows.jsonl", {"val_loss": 1.5})
