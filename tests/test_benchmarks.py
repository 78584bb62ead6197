"""The GPU scripts run here in small, so that a lease is not spent on a typo."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_lm

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_gpu_check_is_within_its_bounds() -> None:
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "gpu_check.py"), "--tiny", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    assert "entries that unmerging missed: 0" in done.stdout and "all within bounds" in done.stdout


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("name", ["frozen", "ours", "peft"])
def test_step_measures(name: str) -> None:
    step = runpy.run_path(str(BENCHMARKS / "step.py"))
    milliseconds, _ = step["measure"](step[name], Namespace(tiny=True, steps=1), False, 0.0)
    assert 0 < milliseconds < 60_000


@pytest.mark.parametrize("way", ["full", "galore", "lora"])
def test_galore_is_measured_beside_full_and_lora(way: str) -> None:
    galore = runpy.run_path(str(BENCHMARKS / "galore.py"))
    sizes = {"hidden": 32, "layers": 2, "seq": 8, "batch": 2, "steps": 3, "rank": 4, "gap": 2, "lr": 1e-3, "threads": 1}
    result = galore["measure"](way, Namespace(**sizes))
    weights = 2 * 512 * 32 + 2 * (4 * 32 * 32 + 3 * 96 * 32 + 2 * 32) + 32
    ends, vectors = 2 * 512 * 32, 2 * 2 * 32 + 32
    moments = {  # entries of exp_avg and exp_avg_sq, of projectors
        "full": 2 * weights,
        "galore": 2 * (ends + vectors) + 2 * (4 * (2 * 32 * 4 + 4 * 32) + 3 * (2 * 96 * 4 + 4 * 32)),
        "lora": 2 * (ends + 2 * (4 * 4 * 64 + 3 * 4 * 128)),
    }[way]
    steps = 0 if way == "galore" else result["state"] // 4 - moments  # AdamW counts them in a tensor a parameter
    assert result["state"] == 4 * (moments + steps) and 0 <= steps < 100
    assert result["trainable"] == (weights if way != "lora" else moments // 2) and 0 < result["loss"] < 10


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    return runpy.run_path(str(BENCHMARKS / "family.py"))


@pytest.mark.parametrize("member", ["quickstart", "lora_plus", "rslora", "galore", "full"])
def test_a_member_of_the_family_runs_from_its_yaml(family: dict, member: str) -> None:
    options = Namespace(tiny=True, steps=2, threads=1, questions=6, dtype=None)
    result = family["measure"](member, options)
    assert 0 <= result["accuracy"] <= 1 and result["loss"] > 0 and result["seconds"] > 0 and result["peak"] > 2**20
    whole = sum(p.numel() for p in tiny_lm.llama().parameters())
    assert result["trainable"] == (whole if member in ("galore", "full") else 1792) and result["state"] > 0
    assert f"| {member} | {result['accuracy']:.1%} |" in family["row"](member, result)


def test_a_member_that_fails_is_told_and_the_rest_goes_on(family: dict, capsys: pytest.CaptureFixture, monkeypatch: Any) -> None:
    fine = {"accuracy": 0.5, "loss": 1.0, "trainable": 7, "state": 2**20, "peak": 2**30, "seconds": 0.25}
    seen = {"one": fine, "two": {"error": "ValueError: no"}, "three": fine}
    monkeypatch.setitem(family["main"].__globals__, "child", lambda member, argv: seen[member])
    assert family["main"](["--members", "one", "two", "three"]) == 1
    output = capsys.readouterr().out
    assert "| three | 50.0% | 1.000 | 7 | 1.0 | 1,024 | 0.250 |" in output
    assert "| two | failed |" in output and "two failed: ValueError: no" in output
    assert family["main"](["--members", "one"]) == 0


def test_a_members_error_comes_out_of_its_process(family: dict, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess:
        """The child's work here: importing everything once more takes seconds."""
        assert command[:2] == [sys.executable, str(BENCHMARKS / "family.py")]
        capsys.readouterr()
        code = family["main"](command[2:])
        return subprocess.CompletedProcess(command, code, *capsys.readouterr())

    monkeypatch.setattr(subprocess, "run", run)
    assert "nothing.yaml" in family["child"]("nothing", ["--tiny", "--steps=2"])["error"]
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: killed)
    assert family["child"]("killed", [])["error"] == "exit code -9: it said nothing"
