"""A process that raises ends the others, with the cause; one that hangs is named; other settings on another rank are refused."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.strategies import DDPStrategy

from lightning_lora import LoRACallback
from lightning_lora.cli.main import main
from lightning_lora.strategies import roll_call
from lightning_lora.strategies.standing import hanging
from tests import tiny_lm
from tests.distributed.nets import CONFIG
from tests.distributed.pool import Pool
from tests.distributed.runs import LitShared, run

STRATEGIES = ["ddp", "fsdp full", "fsdp2 full", "fsdp2 after", "lora_fsdp2", "tp"]
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "alpha": ({"alpha": 16}, "alpha=8.0 on rank 0, 16.0 on rank 1"),
    "dropout": ({"dropout": 0.1}, "dropout=0.0 on rank 0, 0.1 on rank 1"),
    "rank": ({"rank": 2}, "rank=4 on rank 0, 2 on rank 1"),
    "targets": ({"target_modules": ["q"]}, "target_modules=['q', 'v', 'fc1', 'fc2'] on rank 0, ['q'] on rank 1"),
    "lora_plus_ratio": ({}, "lora_plus_ratio=1.0 on rank 0, 16.0 on rank 1"),
}


def run_with_others(name: str, what: str, folder: str) -> str:
    """A run with another setting on the second rank; the error."""
    fields, _ = OTHERS[what] if dist.get_rank() else ({}, "")
    ratio = 16.0 if what == "lora_plus_ratio" and dist.get_rank() else 1.0
    steps: list[int] = []

    class Steps(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            steps.append(1)

    with pytest.raises(ValueError) as error:
        run(name, folder, 1, config=replace(CONFIG, **fields), lora_plus_ratio=ratio, more=(Steps(),))
    assert not steps, "before the first step"
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "what"), [*((name, "alpha") for name in STRATEGIES), *(("ddp", what) for what in OTHERS if what != "alpha")]
)
def test_other_settings_on_another_rank(pool: Any, tmp_path: Path, name: str, what: str) -> None:
    """An error on both, which has both values."""
    first, second = pool.run(run_with_others, name, what, str(tmp_path))
    assert first == second
    assert OTHERS[what][1] in first and "Give every process the same" in first


def fit_by_file(folder: str) -> tuple[int, str]:
    """The exit code of a rank that starts with a file of its own, and what it says."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = main(["fit", "--config", f"{folder}/{dist.get_rank()}.yaml"])
    return code, said.getvalue()


def test_other_files_on_the_command_lines_of_the_ranks(pool: Any, tmp_path: Path) -> None:
    """Where each rank starts a command of its own, as under SLURM and torchrun."""
    content: dict[str, Any] = {
        "model": {"model": tiny_lm.save(tmp_path / "model")},
        "data": {"train": tiny_lm.write(tmp_path / "train.jsonl", tiny_lm.rows(6)), "batch_size": 2},
        "trainer": {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "default_root_dir": str(tmp_path)},
    }
    for rank, lora in enumerate(({"rank": 2}, {"rank": 4, "alpha": 32, "dropout": 0.1})):
        (tmp_path / f"{rank}.yaml").write_text(yaml.safe_dump(content | {"lora": {"config": lora}}))
    for code, text in pool.run(fit_by_file, str(tmp_path)):
        assert code == 2, text
        for said in ("rank=2 on rank 0, 4 on rank 1", "alpha=16.0 on rank 0, 32.0 on rank 1", "dropout=0.0 on rank 0, 0.1 on rank 1"):
            assert said in text
        assert "LoRACallback has other settings on rank 1: " in text and "Give every process the same" in text


class Raises(L.Callback):
    """The second rank raises, or hangs, at a place of the run; the others do not."""

    def __init__(self, where: str, action: Callable[[], None]) -> None:
        self.where, self.action = where, action

    def on_fit_start(self, *args: Any) -> None:
        self._at("fit_start")

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            self._at("step")

    def on_save_checkpoint(self, *args: Any) -> None:
        self._at("save")

    def _at(self, where: str) -> None:
        if where == self.where and dist.get_rank() == 1:
            self.action()


def fails() -> None:
    raise KeyError("no such row")


def hangs() -> None:
    time.sleep(30)


def run_where_one(action: Callable[[], None], name: str, where: str, folder: str) -> tuple[str, str]:
    """The type and text of the first rank's error. The second one's process ends with its error, as a script does."""
    rank, world = dist.get_rank(), dist.get_world_size()
    timeout = timedelta(seconds=60 if action is fails else 2)
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=Path(folder, "meeting").as_uri(), rank=rank, world_size=world, timeout=timeout)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Exception) as error:
        patch.setattr(roll_call, "GRACE", 0.2)
        run(name, folder, 1, save=True, more=(Raises(where, action),))
    text = "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])
    if rank == 1:
        Path(folder, "second").write_text(f"{type(error.value).__name__}: {text}")
        os._exit(1)
    return type(error.value).__name__, text


def first_of(action: Callable[[], None], name: str, where: str, folder: Path) -> tuple[str, str]:
    """Run it in workers of its own, because process groups do not survive it. Return what the first rank's error says."""
    workers = Pool(2)
    try:
        workers.run(len, "")  # starts them
        for _, pipe in workers.workers:
            pipe.send((run_where_one, (action, name, where, str(folder))))
        _, pipe = workers.workers[0]
        assert pipe.poll(25), "the first rank waits"
        ok, value = pipe.recv()
        assert ok, value
        return value
    finally:
        workers.close()


@pytest.mark.parametrize(
    ("name", "where"), [*((name, "step") for name in ("ddp", "fsdp full", "fsdp2 full", "tp")), ("ddp", "fit_start"), ("ddp", "save")]
)
def test_one_that_raises_ends_the_other(tmp_path: Path, name: str, where: str) -> None:
    """With the cause, and long before the minute that its collective would wait."""
    kind, said = first_of(fails, name, where, tmp_path)
    assert kind in ("RuntimeError", "DistBackendError")
    assert "Rank 1 raised first: KeyError: 'no such row'" in said
    assert (tmp_path / "second").read_text().startswith("KeyError: 'no such row'")


def test_one_that_hangs_is_named(tmp_path: Path) -> None:
    """Within the process group's timeout."""
    kind, said = first_of(hangs, "ddp", "step", tmp_path)
    assert kind == "RuntimeError" and "Rank 1 did not raise within 0.4 s: it hangs, ended, or waits for this process." in said
    assert re.search(r"^Rank 1 was last seen at distributed/test_roll_call\.py:\d+ \(hangs\)\.$", said, re.MULTILINE)


def run_that_stands(folder: str, on: str, seconds: float) -> list[str]:
    """A run that the second process holds up for a while, and goes on. What is logged meanwhile."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger(roll_call.__name__)
    log.addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(roll_call, "LONGEST", seconds / 4)
            if on == "cpu":
                run("ddp", folder, 1, more=(Raises("step", lambda: time.sleep(seconds)),))
            else:
                fit_on_gpus(Raises("step", lambda: time.sleep(seconds)))
    finally:
        log.removeHandler(handler)
    return said


def test_one_that_hangs_is_named_while_the_others_wait(pool: Any, tmp_path: Path) -> None:
    """Once, by one of the processes, with where each stands. The run goes on if the process does."""
    (said,) = [line for lines in pool.run(run_that_stands, str(tmp_path), "cpu", 2.0) for line in lines]
    assert re.match(
        r"Rank 1 hangs: for \d s the processes have not moved: rank 0 at autograd/\S+ .*; rank 1 at distributed/test_roll_call", said
    )


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([([0, 3], True), ([0, 3], False)], [1]),  # one is in a collective
        ([([0, 3], False), ([0, 2], False)], [1]),  # one is a batch behind: a kernel is waited for later than it is launched
        ([([0, 3], True), ([0, 3], True)], [0, 1]),  # both in a collective, perhaps not the same one
        ([([1, 0], True), ([0, 9], True), ([0, 9], False)], [2]),
    ],
)
def test_whom_the_others_wait_for(records: list[tuple[list[int], bool]], expected: list[int]) -> None:
    assert hanging({rank: {"position": position, "in_torch": inside} for rank, (position, inside) in enumerate(records)}) == expected


def raise_on_both(folder: str) -> str:
    """Both raise the same at the same place; the process group is there afterwards."""

    class Both(L.Callback):
        def on_before_backward(self, *args: Any) -> None:
            raise ZeroDivisionError("on both")

    with pytest.raises(ZeroDivisionError) as error:
        run("ddp", folder, 1, more=(Both(),))
    dist.barrier()
    return str(error.value)


def test_what_all_raise_stays_as_it_is(pool: Any, tmp_path: Path) -> None:
    assert pool.run(raise_on_both, str(tmp_path)) == ["on both"] * 2


def test_an_error_on_one_process_stays_as_it_is(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_before_backward(self, *args: Any) -> None:
            raise ZeroDivisionError("alone")

    with pytest.raises(ZeroDivisionError) as error:
        run("single", str(tmp_path), 1, more=(Fails(),))
    assert str(error.value) == "alone"
    assert torch.is_grad_enabled() and LoRACallback()._roll_call is None


def test_over_nccl_a_store_that_ends_with_its_process_counts_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that looks into it then frees this process's collectives too, which NCCL does not."""
    gone = dist.DistNetworkError("Connection was likely closed")
    aborted: list[bool] = []
    call = object.__new__(roll_call.RollCall)
    call._done, call._prefix, call._aborts = SimpleNamespace(wait=lambda seconds: False), "", True  # type: ignore[assignment]
    monkeypatch.setattr(roll_call, "default_store", lambda: SimpleNamespace(clone=lambda: (_ for _ in ()).throw(gone)))
    monkeypatch.setattr(roll_call, "is_distributed", lambda: True)
    monkeypatch.setattr(roll_call, "abort_process_groups", lambda: aborted.append(True))
    call._watch()
    assert aborted == [True]


def fit_on_gpus(callback: L.Callback) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    callbacks = [LoRACallback(CONFIG, merge_on_fit_end=False), callback]
    L.Trainer(accelerator="gpu", devices=2, strategy=DDPStrategy(), max_epochs=1, callbacks=callbacks, **quiet).fit(LitShared())


def run_on_gpus(folder: str) -> tuple[str, float]:
    """DDP over NCCL, whose collectives wait whatever the other processes do. The second process raises, and lives on."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Exception) as error:
        patch.setattr(roll_call, "GRACE", 1.0)
        begun = time.monotonic()
        fit_on_gpus(Raises("step", fails))
    return "\n".join([f"{type(error.value).__name__}: {error.value}", *getattr(error.value, "__notes__", [])]), time.monotonic() - begun


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_one_that_raises_ends_the_other_on_gpus(tmp_path: Path) -> None:
    workers = Pool(2, "cuda")
    try:
        (first, waited), (second, _) = workers.run(run_on_gpus, str(tmp_path))
    finally:
        workers.close()
    assert "Rank 1 raised first: KeyError: 'no such row'" in first and waited < 60
    assert second.startswith("KeyError")


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_one_that_hangs_is_named_on_gpus(tmp_path: Path) -> None:
    """NCCL's collectives do not fail by themselves, and its watchdog ends the process without a word of who hangs."""
    workers = Pool(2, "cuda")
    try:
        said = [line for lines in workers.run(run_that_stands, str(tmp_path), "cuda", 12.0) for line in lines]
    finally:
        workers.close()
    # NCCL takes seconds to begin, which may be told too.
    assert re.match(r"Rank 1 hangs: for \d+ s the processes have not moved: .*rank 1 at distributed/test_roll_call", said[-1])
