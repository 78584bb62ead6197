"""Every task through the command line: from rows to a config, a fit, a merged model and predictions."""

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from lightning_lora.cli.main import main
from lightning_lora.cli.task_file import read_task
from tests import tiny_lm
from tests.tasks import tiny

TEXTS = [
    {"text": f"which {word} is {w}", "label": "warm" if word in ("red", "blood") else "cold"} for word in ("red", "blue") for w in "aa"
]
TAGS = [{"tokens": ["the", "sky", "is", "blue"], "tags": ["O", "THING", "O", "COLOUR"]}] * 3
PAIRS = [{"prompt": f"which colour is the {word}", "chosen": "blue sky", "rejected": "red"} for word in ("sky", "pear", "grass")]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1"]
TASKS = {
    "SequenceClassificationTask": ("bert", TEXTS, "AutoModelForSequenceClassification"),
    "TokenClassificationTask": ("bert", TAGS, "AutoModelForTokenClassification"),
    "Seq2SeqTask": ("t5", tiny_lm.rows(4), "AutoModelForSeq2SeqLM"),
    "DPOTask": ("chat", PAIRS, "AutoModelForCausalLM"),
}


@pytest.mark.parametrize("task", TASKS)
def test_from_rows_to_a_merged_model(task, tmp_path, capsys, monkeypatch):
    kind, rows, auto_class = TASKS[task]
    monkeypatch.chdir(tmp_path)
    model = tiny_lm.save(tmp_path / "model") if kind == "chat" else tiny.save(tmp_path / "model", kind)
    data = tiny_lm.write(tmp_path / "rows.jsonl", rows)
    assert main(["init", model, data]) == 0
    config = yaml.safe_load(Path("run.yaml").read_text())
    assert config["model"]["class_path"] == f"lightning_lora.tasks.{task}" and config["data"]["train"] == data
    capsys.readouterr()
    assert main(["inspect", "run.yaml", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["task"] == task and seen["train"]["examples"] == len(rows) and 0 < len(seen["examples"]) <= 3
    assert main(["fit", "--config", "run.yaml", *QUIET, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (adapter,), (checkpoint,) = report["adapter"], report["checkpoints"]
    assert read_task(adapter).auto_class == read_task(checkpoint).auto_class == auto_class
    assert read_task(adapter).labels == read_task(checkpoint).labels
    merged = []
    for path in (adapter, checkpoint):
        out = f"merged{len(merged)}"
        assert main(["merge", model, path, out]) == 0
        merged.append(getattr(transformers, auto_class).from_pretrained(out))
    states = [network.state_dict() for network in merged]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert tuple(merged[0].config.id2label.values())[: len(read_task(adapter).labels)] == read_task(adapter).labels
    capsys.readouterr()
    if task != "DPOTask":
        assert main(["predict", "--config", "run.yaml", *QUIET, "--ckpt_path", checkpoint, "--data.predict", data]) == 0
        assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == len(rows)
    answers = main(["generate", model, "which colour", "--adapter", adapter, "--max_new_tokens=3"])
    assert answers == (2 if "Classification" in task else 0)


def test_the_short_name_of_a_task_brings_its_data_module(tmp_path, capsys):
    data = tiny_lm.write(tmp_path / "rows.jsonl", TEXTS)
    words = [f"--model.model={tiny.save(tmp_path / 'model', 'bert')}", f"--data.train={data}", "--lora.config.target_modules=[query]"]
    assert (
        main(["fit", "--model", "SequenceClassificationTask", *words, *QUIET, "--trainer.logger=false", "--trainer.fast_dev_run=true"]) == 0
    )
    assert main(["fit", "--model", "SequenceClasificationTask", *words, *QUIET]) == 2
    assert "did you mean 'SequenceClassificationTask'?" in capsys.readouterr().err


def test_labels_come_from_what_was_trained(tmp_path, capsys, monkeypatch):
    """Rows to test have fewer labels, rows to predict none, and no option names them."""
    monkeypatch.chdir(tmp_path)
    rows = tiny_lm.write(tmp_path / "rows.jsonl", TEXTS)
    shared = ["--model=SequenceClassificationTask", f"--model.model={tiny.save(tmp_path / 'model', 'bert')}", *QUIET]
    assert main(["fit", *shared, f"--data.train={rows}", "--lora.config.target_modules=[query]", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    test = tiny_lm.write(tmp_path / "test.jsonl", [row for row in TEXTS if row["label"] == "warm"])
    predict = tiny_lm.write(tmp_path / "predict.jsonl", [{"text": row["text"]} for row in TEXTS])
    shared += ["--lora.config.target_modules=[query]", "--trainer.logger=false"]
    for tuned in (f"--ckpt_path={report['checkpoints'][0]}", f"--lora.start_from={report['adapter'][0]}"):
        assert main(["test", *shared, tuned, f"--data.test={test}", "--json"]) == 0, capsys.readouterr().err
        assert "test_accuracy" in json.loads(capsys.readouterr().out)
        assert main(["predict", *shared, tuned, f"--data.predict={predict}"]) == 0, capsys.readouterr().err
        assert {json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()} <= {"cold", "warm"}
    other = tiny_lm.write(tmp_path / "other.jsonl", [{"text": "blue", "label": name} for name in ("sky", "sea")])
    assert main(["fit", *shared, f"--data.train={other}", f"--lora.start_from={report['adapter'][0]}"]) == 2
    assert "other.jsonl:1: the label 'sky' is none of ['cold', 'warm']" in capsys.readouterr().err.splitlines()[-1]


def test_a_task_file_names_nothing_else(tmp_path):
    (tmp_path / "task.json").write_text('{"auto_class": "os.system"}')
    with pytest.raises(ValueError, match=r"task.json names auto_class='os.system'; there are AutoModel"):
        read_task(str(tmp_path))
    (tmp_path / "task.json").write_text("[")
    with pytest.raises(ValueError, match=r"task.json is not JSON"):
        read_task(str(tmp_path))
