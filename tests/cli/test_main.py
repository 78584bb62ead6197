"""Exit codes, one line per error, nothing written; pipes and interruptions in processes of their own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from lightning_lora.cli.main import main
from tests import tiny_lm


def test_help_lists_every_command(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        output = capsys.readouterr().out
        assert all(f"\n  {name} " in output for name in ("fit", "validate", "test", "predict", "inspect", "merge", "generate"))
    for command in ("fit", "merge"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
    assert "--overwrite" in capsys.readouterr().out


def test_the_help_has_a_run_to_start_from(model, tmp_path, capsys, monkeypatch):
    """It runs as printed, once the model and the files are there; nothing in it is a file of the repository."""
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    text = printed[printed.index("\n\nmodel:\n") :]
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        tiny_lm.write(tmp_path / f"{split}.jsonl", tiny_lm.rows(6))
    (tmp_path / "run.yaml").write_text(text.replace(yaml.safe_load(text)["model"]["model"], model))
    assert main(["fit", "--config", "run.yaml", "--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true"]) == 0


def test_the_command_line_starts_without_heavy_imports():
    code = "import sys, lightning_lora.cli.main as c; c.main(['--help']); print(sorted({'transformers', 'lightning'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
