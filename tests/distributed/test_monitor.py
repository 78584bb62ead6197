"""``LoRAMonitor`` under the strategies: the numbers of one process, on the first rank; FSDP1 is passed over with a warning."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import LoRAMonitor
from tests.distributed.runs import run


def watched(name: str, folder: str, **kwargs: Any) -> dict[str, Any]:
    """One rank's measurements, and what it found."""
    monitor = LoRAMonitor(every_n_steps=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(name, folder, 2, more=(monitor,), **kwargs)
    history, found = monitor.history, monitor.findings
    return {
        "history": None if history is None else (history.names, history.steps, history.rows),
        "weights": None if found is None else [row.weight_norm for row in found.rows],
        "moved": found is not None and all(row.moved == ("lora_A", "lora_B") for row in found.rows) and not found.changed_base,
        "said": [str(warning.message) for warning in said if "LoRAMonitor" in str(warning.message)],
    }


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return watched("single", str(tmp_path_factory.mktemp("single")))


@pytest.mark.parametrize("name", ["ddp", "fsdp2 after", "lora_fsdp2", "tp after"])
def test_numbers_are_those_of_one_process(pool: Any, single: dict[str, Any], tmp_path: Path, name: str) -> None:
    first, *_ = pool.run(watched, name, str(tmp_path))
    assert first["moved"] and first["weights"] == pytest.approx(single["weights"], rel=1e-6)
    names, steps, rows = first["history"]
    assert [n.removeprefix("net.") for n in names] == [n.removeprefix("net.") for n in single["history"][0]] and steps == [0, 2, 4]
    for mine, theirs in zip(rows, single["history"][2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(rows[0], single["history"][2][0], rtol=1e-4, atol=1e-6, equal_nan=True)  # before any step
    assert (tmp_path / "lora_monitor" / "report.html").is_file()


def test_flattened_factors_are_passed_over(pool: Any, tmp_path: Path) -> None:
    first, *_ = pool.run(watched, "fsdp full", str(tmp_path))
    assert first["history"] is None and "FSDP1" in first["said"][0]
