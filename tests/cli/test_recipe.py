"""Each value of a recipe follows from what was seen, and the file that `init` writes runs."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from lightning_lora.cli import recipe
from lightning_lora.cli.main import main
from lightning_lora.cli.recipe import Seen, batch_size, lora_rank, max_length
from tests import tiny_lm

SEEN = Seen(lengths=[10] * 97 + [100, 500, 9000], learnt=1000, context=2048, parameters=10**8, per_rank=10**5, device="cpu")


def test_max_length_covers_most_rows_within_the_context():
    assert max_length(SEEN) == 512
    assert max_length(dataclasses.replace(SEEN, context=400)) == 400
    assert max_length(dataclasses.replace(SEEN, lengths=[64])) == 64 and max_length(dataclasses.replace(SEEN, lengths=[65])) == 128


@pytest.mark.parametrize(
    ("length", "device", "size"), [(64, "cpu", 16), (512, "cpu", 4), (700, "cpu", 2), (9000, "cpu", 1), (1024, "cuda", 8)]
)
def test_batches_fit(length, device, size):
    assert batch_size(length, device) == size


def test_the_rank_holds_what_is_learnt():
    assert lora_rank(SEEN) == 8
    assert lora_rank(dataclasses.replace(SEEN, learnt=4 * 10**6)) == 32  # 2 million parameters are 20 of rank 1
    assert lora_rank(dataclasses.replace(SEEN, learnt=10**12)) == 128


def test_what_init_writes_runs(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_lm.write(tmp_path / "rows 1.jsonl", tiny_lm.rows(60))
    assert main(["init", model, "rows 1.jsonl"]) == 0
    written = Path("run.yaml").read_text()
    assert written in capsys.readouterr().out
    config = yaml.safe_load(written)
    assert config["data"] == {"train": "rows 1.jsonl", "val": 0.1, "max_length": 64, "batch_size": 16}
    assert config["lora"]["config"]["target_modules"] == "all-linear" and config["model"]["learning_rate"] == "auto"
    assert main(["init", model, "rows 1.jsonl"]) == 2
    assert "out='run.yaml' exists; name another file, or pass --overwrite" in capsys.readouterr().err
    assert main(["fit", "--config", "run.yaml", "--trainer.accelerator=cpu", "--trainer.max_steps=1"]) == 0
    assert main(["init", model, "rows 1.jsonl", "--overwrite", "--json", "--val=0.5"]) == 0
    assert yaml.safe_load(Path("run.yaml").read_text())["data"]["val"] == 0.5


@pytest.mark.parametrize(("dtype", "slow", "written"), [("bfloat16", True, "float32"), ("bfloat16", False, None), ("float32", True, None)])
def test_half_weights_are_widened_where_the_processor_has_no_instructions_for_them(dtype, slow, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "multiplies_half_slowly", lambda device: slow)
    tiny_lm.save(tmp_path / "model")
    tiny_lm.llama().to(getattr(torch, dtype)).save_pretrained(tmp_path / "model")
    tiny_lm.write(tmp_path / "rows.jsonl", tiny_lm.rows(4))
    assert main(["init", "model", "rows.jsonl"]) == 0
    assert yaml.safe_load(Path("run.yaml").read_text())["model"].get("dtype") == written


class Small:
    total_memory = 100_000


def test_a_large_model_is_packed_on_a_small_gpu(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Small)
    rows = tiny_lm.write(tmp_path / "rows.jsonl", tiny_lm.rows(4))
    for memory, quantize in ((10**6, None), (40_000, "nf4")):
        Small.total_memory = memory
        assert main(["init", model, rows, f"--out={tmp_path / 'run.yaml'}", "--overwrite"]) == 0
        assert yaml.safe_load((tmp_path / "run.yaml").read_text())["lora"].get("quantize") == quantize
