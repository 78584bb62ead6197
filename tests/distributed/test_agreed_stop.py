"""One process is told to stop: all stop after the same batch, with one checkpoint that a later run resumes from."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_lora.callbacks.interruption import NAME
from lightning_lora.strategies.agreed_stop import LAG, AgreedStop
from tests.distributed.runs import BATCHES, run
from tests.distributed.test_lightning import run_with


def stops(told_at: dict[int, int], batches: int) -> int | None:
    """After which batch this rank stops; rank → batch after which it is told to."""
    stop = AgreedStop(torch.device("cpu"))
    mine = told_at.get(dist.get_rank(), batches + 1)
    for batch in range(1, batches + 1):
        if stop.after_batch(batch >= mine):
            return batch
    stop.close()
    return None


@pytest.mark.parametrize(("told_at", "expected"), [({1: 3}, 3 + LAG), ({0: 4, 1: 2}, 2 + LAG), ({}, None), ({0: 8}, None)])
def test_all_stop_after_the_same_batch(pool: Any, told_at: dict[int, int], expected: int | None) -> None:
    assert pool.run(stops, told_at, 8) == [expected, expected]


class Terminate(L.Callback):
    """Raises SIGTERM in the second process, within a step."""

    def __init__(self, step: int = 0) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.step and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)


def run_terminated(name: str, folder: str, step: int = 0) -> Any:
    """The exit code, and how often the user's own handler was called."""
    called: list[int] = []
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    try:
        with pytest.raises(SIGTERMException) as stop:
            run(name, folder, 4, save=True, more=(Terminate(step),))
    finally:
        signal.signal(signal.SIGTERM, earlier)
    return stop.value.code, len(called)


@pytest.mark.parametrize("name", ["ddp", "lora_fsdp2"])
def test_a_terminated_run_leaves_one_checkpoint(pool: Any, tmp_path: Path, name: str) -> None:
    assert pool.run(run_terminated, name, str(tmp_path)) == [(143, 0), (143, 1)]
    (file,) = tmp_path.rglob(NAME)
    assert torch.load(file, weights_only=True)["global_step"] == 1 + LAG


def test_a_stop_at_an_epochs_end_skips_nothing_later(pool: Any, tmp_path: Path) -> None:
    """Stopped after an epoch's last batch, resumed, and resumed again from that run's checkpoint."""
    whole = pool.run(run_with, "ddp", (str(tmp_path / "whole"), 4), {})
    pool.run(run_terminated, "ddp", str(tmp_path / "first"), 2 * BATCHES - LAG - 1)
    (first,) = (tmp_path / "first").rglob(NAME)
    assert torch.load(first, weights_only=True)["global_step"] == 2 * BATCHES
    pool.run(run_with, "ddp", (str(tmp_path / "second"), 3), {"ckpt": str(first), "save": True})
    third = pool.run(run_with, "ddp", (str(tmp_path / "third"), 4), {"ckpt": str(tmp_path / "second" / "last.ckpt")})
    for mine, wanted in zip(third, whole, strict=True):
        assert mine["losses"] == pytest.approx(wanted["losses"][3 * BATCHES :], abs=1e-6)


def broadcasts_in_steps(folder: str) -> int:
    """How many broadcasts a rank makes from its second batch to its last."""
    calls: list[int] = []
    broadcast = dist.broadcast

    class Count(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                calls.clear()

        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            found.append(len(calls))

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        return broadcast(*args, **kwargs)

    found: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist, "broadcast", counted)
        run("ddp", folder, 4, more=(Count(),))
    return found[0]


def test_lightnings_own_comparison_before_each_batch_is_left_out(pool: Any, tmp_path: Path) -> None:
    """It reads a broadcast flag, for which a process waits until its GPU has done all before."""
    assert pool.run(broadcasts_in_steps, str(tmp_path)) == [0, 0]
