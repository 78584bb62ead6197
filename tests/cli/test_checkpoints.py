"""Which weights `test`, `validate` and `predict` run: those of the run whose config they get, unless an option names others."""

import json
import os

import pytest
import torch

from lightning_lora.cli.checkpoints import best_of
from lightning_lora.cli.main import main
from tests import tiny_lm
from tests.tasks import tiny

# The first of two epochs is "best", and the second is kept too.
SAVER = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val_loss", "mode": "max", "save_top_k": 2, "save_last": True}}


@pytest.fixture
def run(config, tmp_path, capsys, monkeypatch):
    """A run of two epochs, the first of which it calls its best, that keeps this one and the last checkpoint."""
    monkeypatch.chdir(tmp_path)  # without a logger a run leaves its config there
    words = ["--trainer.max_epochs=2", f"--trainer.callbacks={json.dumps(SAVER)}"]
    assert main(["fit", "--config", config, *words]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def loss(capsys, *words):
    assert main(["test", "--json", *words]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)["test_loss"]


def test_a_runs_config_brings_the_runs_weights(run, adapter, capsys, caplog):
    ours = ["--config", str(run / "config.yaml"), "--trainer.logger=false"]
    best, last = (next((run / "checkpoints").glob(pattern)) for pattern in ("epoch=0*.ckpt", "last*.ckpt"))
    of_best, of_last, base = (loss(capsys, *ours, f"--ckpt_path={path}") for path in (best, last, "null"))
    assert len({of_best, of_last, base}) == 3  # else the test shows nothing
    caplog.clear()
    assert loss(capsys, *ours) == of_best
    assert f"Weights of this test: the checkpoint {best}." in caplog.text
    assert loss(capsys, *ours, "--ckpt_path=last") == of_last
    caplog.clear()
    loss(capsys, *ours, "--lora.start_from", adapter, "--lora.config.rank=4")
    assert f"Weights of this test: the adapter {adapter}." in caplog.text


def test_a_run_without_checkpoints_brings_its_adapter(run, capsys, caplog):
    ours = ["--config", str(run / "config.yaml"), "--trainer.logger=false"]
    last = next((run / "checkpoints").glob("last*.ckpt"))
    of_last = loss(capsys, *ours, f"--ckpt_path={last}")  # the adapter is that of the last step
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    assert loss(capsys, *ours) == pytest.approx(of_last, rel=1e-6)
    assert f"Weights of this test: the adapter {run / 'adapter'}." in caplog.text


def test_the_best_is_what_the_newest_checkpoint_says(tmp_path):
    assert best_of(tmp_path / "none") is None
    for age, (name, states) in enumerate(
        [("a", {}), ("b", {}), ("c", {"newest": {"best_model_path": "/elsewhere/c.ckpt", "monitor": None}, "other": 1})]
    ):
        torch.save({"callbacks": states}, tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (age, age))
    assert best_of(tmp_path) == tmp_path / "c.ckpt"
    torch.save({"callbacks": {"x": {"best_model_path": "/elsewhere/a.ckpt", "monitor": "val_loss"}}}, tmp_path / "d.ckpt")
    assert best_of(tmp_path) == tmp_path / "a.ckpt"
    torch.save({"callbacks": 1}, tmp_path / "e.ckpt")
    assert best_of(tmp_path) == tmp_path / "e.ckpt"


@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:The dirpath has changed")
def test_last_and_best_bring_labels(tmp_path, capsys, monkeypatch):
    """Rows to test have fewer labels than the head, rows to predict none."""
    monkeypatch.chdir(tmp_path)
    rows = tiny_lm.write(tmp_path / "rows.jsonl", [{"text": w, "label": w} for w in ("red", "green", "blue")])
    test = tiny_lm.write(tmp_path / "test.jsonl", [{"text": "blue", "label": "blue"}])
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": ".", "name": "run", "version": ""}}
    shared = ["--model=SequenceClassificationTask", f"--model.model={tiny.save(tmp_path / 'model', 'bert')}", "--trainer.accelerator=cpu"]
    shared += ["--lora.config.target_modules=[query]", f"--trainer.logger={json.dumps(logger)}"]
    last = "--trainer.callbacks=" + json.dumps({"class_path": "ModelCheckpoint", "init_args": {"save_last": True}})
    assert main(["fit", *shared, last, f"--data.train={rows}", "--trainer.max_steps=1"]) == 0
    capsys.readouterr()
    for name in ("last", "best"):
        assert "test_accuracy" in results(capsys, *shared, last, f"--ckpt_path={name}", f"--data.test={test}")
        assert main(["predict", *shared, last, f"--ckpt_path={name}", f"--data.predict={test}"]) == 0
        assert json.loads(capsys.readouterr().out)["label"] in ("red", "green", "blue")


def results(capsys, *words):
    assert main(["test", "--json", *words]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_name_that_finds_nothing_is_one_line(config, tmp_path, capsys):
    for name, kind in (("best", "checkpoint"), ("last", r"last*.ckpt")):
        assert main(["test", "--config", config, f"--ckpt_path={name}"]) == 2
        assert f"ckpt_path='{name}': there is no {kind} in {tmp_path / 'run' / 'checkpoints'}" in capsys.readouterr().err
