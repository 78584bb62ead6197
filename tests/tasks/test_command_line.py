"""Tasks from the command line: fit, and predictions that are one readable object per row."""

import json

import pytest

from lightning_lora.cli.main import main
from tests import tiny_lm
from tests.tasks import test_labels, tiny

PAIRS = [{"prompt": "the sky", "chosen": "blue", "rejected": "red"}, {"prompt": "blood", "chosen": "red", "rejected": "blue"}]
# Task → its data module, its model, what LoRA adapts, rows, and the keys of a prediction.
TASKS = {
    "DPOTask": ("PreferenceDataModule", "lm", "[q_proj]", PAIRS, {"prompt", "response"}),
    "SequenceClassificationTask": ("ClassificationDataModule", "bert", "[query]", test_labels.ROWS[:3], {"text", "label", "score"}),
}


@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:The dirpath has changed")
@pytest.mark.parametrize("name", TASKS)
def test_fit_and_predict(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI 2.6 itself calls what is deprecated there
    data, kind, targets, rows, keys = TASKS[name]
    folder = tiny_lm.save(tmp_path / "model") if kind == "lm" else tiny.save(tmp_path / "model", kind)
    file = tiny_lm.write(tmp_path / "rows.jsonl", rows)
    shared = [
        f"--model=lightning_lora.tasks.{name}",
        f"--model.model={folder}",
        f"--data=lightning_lora.data.{data}",
        f"--data.train={file}",
    ]
    shared += [f"--data.train={file}", "--trainer.accelerator=cpu", f"--trainer.logger.init_args.save_dir={tmp_path}", f"--data.val={file}"]
    shared += [f"--lora.config.target_modules={targets}", "--trainer.max_epochs=1"]
    assert main(["fit", *shared, "--trainer.log_every_n_steps=1"]) == 0, capsys.readouterr().err
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    capsys.readouterr()
    assert main(["predict", *shared, f"--data.predict={file}", f"--ckpt_path={checkpoint}"]) == 0, capsys.readouterr().err
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == len(rows) and all(row.keys() == keys for row in found)
