"""``LoRAMonitor`` under the strategies: the numbers of one process, on the first rank; FSDP1 is passed over with a warning."""

from __future__ import annotations

import warnings
from functools import partial
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


def resized(name: str, folder: str, grow: bool = False, **kwargs: Any) -> dict[str, Any]:
    """One rank's run whose ranks change after its first epoch."""
    share = {"energy": 1.0, "rank_budget": 1.5} if grow else {"energy": 0.8}
    monitor = LoRAMonitor(every_n_steps=2, apply_ranks_at=2, report=False, **share)
    done = run(name, folder, 3, save=True, more=(monitor,), **kwargs)
    return {**done, "ranks": monitor.rank_change.ranks, "step": monitor.rank_change.step}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Any]]:
    return {grow: resized("single", str(tmp_path_factory.mktemp("one")), grow) for grow in (False, True)}


@pytest.mark.parametrize("grow", [False, True])
def test_ranks_change_under_ddp_as_in_one_process(pool: Any, one_process: Any, tmp_path: Path, grow: bool) -> None:
    ranks, single = pool.run(resized, "ddp", str(tmp_path), grow), one_process[grow]
    for each in ranks:
        assert each["ranks"] == single["ranks"] != {} and each["step"] == 2
        assert any(after > before for before, after in each["ranks"].values()) == grow
        assert each["losses"] == pytest.approx(single["losses"], rel=1e-4)
        for name, values in each["adapters"].items():
            assert torch.equal(values, ranks[0]["adapters"][name]), "the processes stay equal"
            torch.testing.assert_close(values.abs(), single["adapters"][name].abs(), rtol=1e-2, atol=1e-4)


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory, one_process: Any) -> str:
    """A checkpoint of one process, after the change."""
    folder = tmp_path_factory.mktemp("halfway")
    first = resized("single", str(folder), max_steps=4)
    assert first["losses"] == one_process[False]["losses"][:4]
    return str(folder / "last.ckpt")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("name", ["ddp", "lora_fsdp2", "single"])
def test_changed_ranks_resume_under_any_strategy(pool: Any, one_process: Any, halfway: str, tmp_path: Path, name: str) -> None:
    go_on = partial(resized, name, str(tmp_path), ckpt=halfway)
    rest = go_on() if name == "single" else pool.run(go_on)[0]
    assert rest["losses"] == pytest.approx(one_process[False]["losses"][4:], rel=1e-4) and len(rest["losses"]) == 2
    assert rest["ranks"] == one_process[False]["ranks"]


def refused(name: str, folder: str) -> str:
    try:
        resized(name, folder)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("name", "said"), [("lora_fsdp2", "is sharded, so it cannot get another rank"), ("fsdp full", "FSDP1 has flattened")]
)
def test_sharded_factors_are_refused_before_training(pool: Any, tmp_path: Path, name: str, said: str) -> None:
    assert all(said in each for each in pool.run(refused, name, str(tmp_path)))
