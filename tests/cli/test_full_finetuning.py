"""Every task trained in full through the command line: its checkpoint predicts, answers, and becomes a model's folder."""

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from lightning_lora.cli.main import main
from tests import tiny_lm
from tests.cli.test_tasks import QUIET, TASKS
from tests.tasks import tiny

FULL = {"full_finetuning": True, "model": {"learning_rate": "auto", "dtype": "float32"}}  # as configs/full.yaml, at an advised rate
MONITOR = [
    "--trainer.callbacks+=lightning.pytorch.callbacks.ThroughputMonitor",
    "--trainer.callbacks.batch_size_fn=lightning_lora.tasks.rows_of",
    "--trainer.callbacks.window_size=2",
]


def prepared(task, folder, monkeypatch):
    """A model, rows, and the config that `init` writes for them with full fine-tuning on top."""
    monkeypatch.chdir(folder)
    if task == "ImageClassificationTask":
        image = pytest.importorskip("PIL.Image")
        for name in ("red", "blue"):
            (folder / "photos" / name).mkdir(parents=True)
            for i in range(2):
                image.new("RGB", (32, 32), name).save(folder / "photos" / name / f"{i}.png")
        model, data = tiny.save(folder / "model", "vit"), str(folder / "photos")
        auto_class = "AutoModelForImageClassification"
    else:
        kind, rows, auto_class = {**TASKS, "CausalLMTask": ("chat", tiny_lm.rows(4), "AutoModelForCausalLM")}[task]
        model = tiny_lm.save(folder / "model") if kind == "chat" else tiny.save(folder / "model", kind)
        data = tiny_lm.write(folder / "rows.jsonl", rows)
    assert main(["init", model, data]) == 0
    config = yaml.safe_load(Path("run.yaml").read_text())
    Path("full.yaml").write_text(yaml.safe_dump(FULL))
    assert "class_path" in config["model"] or task == "CausalLMTask"
    return model, data, auto_class


@pytest.mark.filterwarnings("ignore:target_modules=.all-linear. leaves out")
@pytest.mark.parametrize("task", ["CausalLMTask", "ImageClassificationTask", *(name for name in TASKS if name != "DPOTask")])
def test_its_checkpoint_becomes_a_model(task, tmp_path, capsys, monkeypatch):
    model, data, auto_class = prepared(task, tmp_path, monkeypatch)
    capsys.readouterr()
    assert main(["fit", "--config", "run.yaml", "--config", "full.yaml", *QUIET, *MONITOR, "--json"]) == 0, capsys.readouterr().err
    report = json.loads(capsys.readouterr().out)
    assert report["adapter"] == [] and any(command.startswith("lightning-lora merge") for command in report["next"])
    assert "device/flops_per_sec" in Path(report["metrics"]).read_text().splitlines()[0]
    (checkpoint,) = report["checkpoints"]
    assert main(["merge", model, checkpoint, "out"]) == 0, capsys.readouterr().err
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    made = getattr(transformers, auto_class).from_pretrained("out").state_dict()
    assert all(torch.equal(tensor, made[name.removeprefix("model.")]) for name, tensor in trained.items() if name.startswith("model."))
    before = getattr(transformers, auto_class).from_pretrained(model, num_labels=len(made.get("classifier.bias", [0, 0]))).state_dict()
    assert sum(not torch.equal(before[name], made[name]) for name in before) > len(before) / 2
    capsys.readouterr()
    assert main(["predict", "--config", report["config"], "--ckpt_path", checkpoint, "--data.predict", data]) == 0
    predicted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(predicted) == 4 or task == "TokenClassificationTask"
    writes = "Classification" not in task
    for words in ([model, "which colour", "--adapter", checkpoint], ["out", "which colour"]):
        assert main(["generate", *words, "--max_new_tokens=3"]) == (0 if writes else 2)
    errors = capsys.readouterr().err
    assert writes or "writes no texts" in errors


def test_preference_pairs_need_a_reference(tmp_path, capsys, monkeypatch):
    prepared("DPOTask", tmp_path, monkeypatch)
    capsys.readouterr()
    assert main(["fit", "--config", "run.yaml", "--config", "full.yaml", *QUIET]) == 2
    assert "DPOTask has no reference: it is the model with its adapters off" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("runs").exists()
