"""The GPU scripts run here in small, so that a lease is not spent on a typo."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

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


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["frozen", "ours", "PEFT"])
def test_qlora_step_measures(name: str, checkpointed: bool) -> None:
    """The model is made packed, block by block: no linear of it is ever seen unpacked but the head."""
    from lightning_lora.packing import packing_of

    step = runpy.run_path(str(BENCHMARKS / "qlora_step.py"))
    milliseconds, _ = step["measure"](name, Namespace(tiny=True, steps=1), False, checkpointed)
    assert 0 < milliseconds < 60_000
    model = step["MODES"][name](step["build"](step["TINY"], "cpu"))
    assert len([module for module in model.modules() if packing_of(module) is not None]) == 2 * 7
    assert not any(parameter.is_meta for parameter in model.parameters())
