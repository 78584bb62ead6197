"""`inspect` of rows: what is shown as learnt is what the run learns."""

import io
import json
import sys
from pathlib import Path

import pytest
import yaml

from lightning_lora.cli.inspect_rows import run_words
from lightning_lora.cli.main import main
from tests import tiny_lm
from tests.tasks import tiny

CHAT = [
    {
        "messages": [
            {"role": "user", "content": "which colour is grass"},
            {"role": "assistant", "content": "green"},
            {"role": "user", "content": "is blood red"},
            {"role": "assistant", "content": "red red"},
        ]
    }
]


@pytest.fixture
def rows(tmp_path):
    return tiny_lm.write(tmp_path / "chat.jsonl", CHAT)


def test_a_data_file(model, rows, capsys):
    assert main(["inspect", rows, "--model", model]) == 0
    output = capsys.readouterr().out
    lines = [line.split() for line in output.splitlines()]
    assert ["tokens", "22"] in lines and ["longest", "22"] in lines and ["learnt", "tokens", "23%"] in lines
    shown = next(line for line in output.splitlines() if line.startswith("<s> user"))
    assert [part.split("»")[0].split() for part in shown.split("«")[1:]] == [["green", "</s>"], ["red", "red", "</s>"]]
    assert "\x1b" not in output and "LoRA on" not in output
    assert main(["inspect", rows, "--model", model, "--json", "--data.train_on=last"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert [part["text"].split() for part in seen["examples"][0] if part["learnt"]] == [["red", "red", "</s>"]]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colour_on_a_terminal(model, rows, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["inspect", rows, "--model", model]) == 0
    assert "\x1b[32mgreen </s>\x1b[0m" in sys.stdout.getvalue() and "«" not in sys.stdout.getvalue()


def test_a_runs_config_shows_its_model_too(config, capsys):
    assert main(["inspect", config, "--lora.config.rank=3", "--data.val=null"]) == 0
    output = capsys.readouterr().out
    assert "LoRA on 4 modules, 672 parameters" in output and "train: " in output and "val: " not in output
    assert output.count("example ") == 3


def test_the_folder_of_a_finished_run(config, tmp_path, capsys):
    settings = yaml.safe_load(Path(config).read_text()) | {"ckpt_path": None, "weights_only": None}  # as fit writes them
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["inspect", str(tmp_path)]) == 0
    assert "LoRA on" in capsys.readouterr().out


def test_a_run_that_trains_every_weight_has_no_adapter_to_show(config, capsys):
    assert main(["inspect", config, "--full_finetuning=true"]) == 0
    assert "LoRA on" not in capsys.readouterr().out


def test_a_class_of_ones_own_shows_no_rows(config, tmp_path, capsys):
    content = yaml.safe_load(Path(config).read_text())
    content["data"] = {"class_path": "tests.cli.test_lightning_cli.Data"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    assert main(["inspect", str(tmp_path / "own.yaml")]) == 2
    assert "Data shows no rows" in capsys.readouterr().err


def test_what_is_a_run(tmp_path):
    (tmp_path / "config.yaml").touch()  # a run leaves it in its folder
    assert run_words([str(tmp_path)]) == ["--config", str(tmp_path / "config.yaml")]
    assert run_words(["a.yaml", "--json", "--lora.rank=3"]) == ["--config", "a.yaml", "--lora.config.rank=3"]
    assert run_words(["a.jsonl", "--model", "m", "--gguf_file=g"]) == ["--data.train=a.jsonl", "--model.model", "m", "--model.gguf_file=g"]
    assert run_words(["owner/name"]) is None and run_words(["--help"]) is None and run_words([]) is None


def test_a_stream_is_refused(model, rows, capsys):
    assert main(["inspect", rows, "--model", model, "--data.streaming", "true"]) == 2
    assert "add --data.streaming false" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "rows", "shown"),
    [
        ("bert", [{"text": "the sky is blue", "label": "cold"}, {"text": "blood is red", "label": "warm"}], [" «cold»", " «warm»"]),
        (
            "bert",
            [{"tokens": ["the", "sky", "is"], "tags": ["O", "THING", "O"]}, {"tokens": ["blood"], "tags": ["THING"]}],
            ["the«O»sky«THING»is«O»"],
        ),
        ("t5", [{"prompt": "which colour", "response": "green apple"}], ["which colour", "«green apple </s>»"]),
        ("chat", [{"prompt": "which", "chosen": "red", "rejected": "blue"}], ["chosen:", "«red </s>»", "rejected:", "«blue </s>»"]),
    ],
)
def test_every_task_shows_what_is_learnt_in_words(kind, rows, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_lm.save(tmp_path / "model") if kind == "chat" else tiny.save(tmp_path / "model", kind)
    assert main(["init", model, tiny_lm.write(tmp_path / "rows.jsonl", rows)]) == 0
    capsys.readouterr()
    assert main(["inspect", "run.yaml"]) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert all(part in output for part in shown) and "label" not in output, output
    assert ("learnt tokens" in output) == ("tags" in rows[0])


@pytest.mark.filterwarnings("ignore:target_modules=.all-linear. leaves out")
def test_images_show_their_files_and_labels(tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    for name in ("red", "blue"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        image.new("RGB", (32, 32), name).save(tmp_path / "photos" / name / "1.png")
    assert main(["init", tiny.save(tmp_path / "model", "vit"), str(tmp_path / "photos")]) == 0
    assert main(["inspect", "run.yaml"]) == 0
    output = capsys.readouterr().out
    assert "blue/1.png «blue»" in output and "red/1.png «red»" in output and "tokens" not in output.split("# written")[1].split("module")[0]
