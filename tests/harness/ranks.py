"""Fits on two processes under FSDP2, which are killed: one process or both, at a random moment or before a call that changes the disk.

The processes are forked from a server that has imported what they need, and meet as Lightning's own do: at the first one's port.
"""

from __future__ import annotations

import logging
import multiprocessing.connection
import os
import signal
import socket
import tempfile
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback
from lightning_lora.strategies import LoRAFSDP2Strategy, roll_call
from tests.distributed.nets import CONFIG, make_net
from tests.harness import scenarios
from tests.harness.kills import operations
from tests.processes import start

WORLD = 2
TIMEOUT = timedelta(seconds=20)  # of collectives, and of the wait for the others at the start
LONGEST = 60.0  # seconds in which a process has to end after the other one
GRACE = 0.5  # seconds that a failing process waits for the others' errors


@dataclass(frozen=True)
class Fit:
    """A fit, and where one of its processes kills itself: before the n-th call that changes the disk, from the given step's save on."""

    folder: str
    steps: int
    shards: bool
    log: str
    rank: int = -1
    operation: int = 0
    step: int = 0


class Lit(scenarios.Lit):
    """Takes its batch from the number of the step and the rank."""

    def __init__(self, log: Path) -> None:
        super().__init__(log)
        self.net = make_net()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2 * self.global_step + self.global_rank)
        x, y = torch.randn(4, 8, generator=generator), torch.randint(0, 4, (4,), generator=generator)
        loss = torch.nn.functional.cross_entropy(self.net(x), y)
        with self.log_file.open("a") as stream:
            stream.write(f"{self.global_rank}/{self.global_step} {loss.item().hex()}\n")
        return loss


class DiesInASave(ModelCheckpoint):
    """Ends this process by SIGKILL before a call that changes the disk."""

    def __init__(self, fit: Fit, **options: Any) -> None:
        super().__init__(**options)
        self.fit = fit

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        def die(number: int) -> None:
            if number == self.fit.operation:
                os.kill(os.getpid(), signal.SIGKILL)

        if trainer.global_step < self.fit.step or trainer.global_rank != self.fit.rank:
            super()._save_checkpoint(trainer, filepath)
            return
        with operations(die):
            super()._save_checkpoint(trainer, filepath)


def train(rank: int, port: int, fit: Fit) -> None:
    """Be one process of a fit: train with a checkpoint after each step, from the last one if there is one."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tempfile.tempdir = os.environ["TMPDIR"] = f"{fit.folder}/nowhere"  # what is staged there, beside no target, fails
    torch.set_num_threads(1)
    roll_call.GRACE = GRACE
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    last = Path(fit.folder, "last.ckpt")
    trainer = L.Trainer(
        accelerator="cpu", devices=WORLD, max_steps=fit.steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        strategy=LoRAFSDP2Strategy(process_group_backend="gloo", save_distributed_checkpoint=fit.shards, timeout=TIMEOUT),
        callbacks=[
            LoRACallback(CONFIG, merge_on_fit_end=False, check_gradients=False),
            DiesInASave(fit, dirpath=fit.folder, filename="last", every_n_train_steps=1, enable_version_counter=False),
        ],
    )  # fmt: skip
    torch.manual_seed(0)
    try:
        trainer.fit(Lit(Path(fit.log)), ckpt_path=str(last) if last.exists() else None)
    except Exception as error:
        text = "\n".join([str(error), *getattr(error, "__notes__", [])])
        Path(f"{fit.log}.{rank}.error").write_text(f"{type(error).__name__}: {text}")
        os._exit(1)  # as a script ends: without a wait for threads
    os._exit(0)


class Processes:
    """The processes of one fit."""

    def __init__(self, fit: Fit) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.fit = fit
        self.ranks = [start(train, rank, port, fit) for rank in range(WORLD)]

    def wait(self, seconds: float) -> bool:
        """Wait until one of them has ended. Return whether one has."""
        return bool(multiprocessing.connection.wait([process.sentinel for process in self.ranks], seconds))

    def kill(self, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            self.ranks[rank].kill()

    def end(self) -> tuple[list[int], float]:
        """Wait for all. Return the exit codes, and how many seconds the last took longer than the first.

        Raises:
            AssertionError: one did not end by itself.
        """
        self.wait(10 * LONGEST)
        begun = time.monotonic()
        for process in self.ranks:
            process.join(max(0.0, begun + LONGEST - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        self.kill(tuple(hung))
        assert not hung, f"rank {hung} did not end within {LONGEST:.0f} s of the other"
        return [process.exitcode or 0 for process in self.ranks], time.monotonic() - begun

    def error(self, rank: int) -> str:
        """Return what a process raised."""
        return Path(f"{self.fit.log}.{rank}.error").read_text()
