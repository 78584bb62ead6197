"""The GPU scripts run here in small, so that a lease is not spent on a typo."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_gpu_check_is_within_its_bounds() -> None:
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "gpu_check.py"), "--tiny", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    assert "entries that unmerging missed: 0" in done.stdout and "all within bounds" in done.stdout


FLOOR = runpy.run_path(str(BENCHMARKS / "floor.py"))
QUICK = ["--shape", "tiny", "--backend", "eager", "--steps", "1", "--warmup", "1"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_floor_measures_every_mode(capsys: pytest.CaptureFixture[str]) -> None:
    modes = "floor,full,peft-drop,ours-unfused,ours-layer-chunk-ckpt-drop"
    results = FLOOR["main"]([*QUICK, "--modes", modes])
    assert list(results) == modes.split(",") and not [result.error for result in results.values() if result.error]
    assert all(0 < result.ms < 60_000 for result in results.values())
    # The same model, tokens and step: adapters begin at zero, so only rounding differs.
    assert [result.loss for result in results.values()] == pytest.approx([results["floor"].loss] * len(results), rel=2e-2)
    printed = capsys.readouterr().out
    assert all(f"| {mode} | {result.ms:.1f} |" in printed for mode, result in results.items())


def test_floor_says_what_failed_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    results = FLOOR["main"]([*QUICK, "--modes", "ours-layer,frozen", "--backend", "no_such_backend"])
    assert "no_such_backend" in results["ours-layer"].error and results["frozen"].ms > 0
    assert "| ours-layer | InvalidBackend" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"mode 'ours-fast'"):
        FLOOR["main"]([*QUICK, "--modes", "ours-fast"])


def test_floor_profiles_and_counts_what_is_done_once(capsys: pytest.CaptureFixture[str]) -> None:
    kernels = FLOOR["main"]([*QUICK, "--profile", "ours-chunk"])["ours-chunk"].kernels
    assert next(iter(kernels.values()))[0] > 0 and kernels["aten::mm"][1] > 14 * 2
    costs = FLOOR["main"]([*QUICK, "--costs"])
    assert list(costs) == ["inject", "save", "merge", "unmerge"] and all(seconds > 0 for seconds, *_ in costs.values())
    assert "| ours-chunk |" not in capsys.readouterr().out


def test_floor_grows() -> None:
    results = FLOOR["main"]([*QUICK, "--growth", "--modes", "ours"])
    assert list(results) == ["rank 8, ours", "rank 32, ours", "length 16, ours", "1 layers, ours"]
    assert not [result.error for result in results.values() if result.error]
