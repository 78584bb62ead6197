"""Processes that stay: importing torch and Lightning takes seconds, so one set of workers (gloo's) runs all distributed tests.

They are forked from a server that has imported what they need, so that four of them, or new ones after an error, start at once.

``Pool(2).run(function, *args)`` runs a module-level function on every rank and returns what each returned. An exception on
any rank is raised here with that rank's traceback; workers that then hang in a collective are replaced.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import seed_no_gpus
from tests.processes import SERVER

TIMEOUT = 240.0  # of a busy machine; pytest gives up at 300


class Pool:
    def __init__(self, world: int, device: str = "cpu") -> None:
        self.world, self.device = world, device
        self.workers: list[tuple[Any, Any]] = []
        self.folder = ""

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if not self.workers:
            self._start()
        elif not all(process.is_alive() for process, _ in self.workers):  # one died between two tests: theirs need not fail for it
            self.close()
            self._start()
        for _, pipe in self.workers:
            pipe.send((function, args))
        results, errors = [], []
        for rank, (process, pipe) in enumerate(self.workers):
            # After one rank's error the others may wait for it in a collective for ever.
            if not pipe.poll(TIMEOUT if not errors else 2.0):
                errors.append(f"rank {rank} did not answer ({'alive' if process.is_alive() else process.exitcode})")
                continue
            try:
                ok, value = pipe.recv()
            except (EOFError, ConnectionResetError):  # it died in the middle
                process.join(2.0)
                ok, value = False, f"rank {rank} died, exit code {process.exitcode}"
            (results if ok else errors).append(value)
        if errors:
            self.close()
            raise RuntimeError("\n".join(errors))
        return results

    def close(self) -> None:
        for process, _ in self.workers:
            process.kill()
            process.join()
        self.workers = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        # They meet over a file: a port that was free may be taken by the time they have started.
        self.folder = tempfile.mkdtemp()
        meeting = Path(self.folder, "meeting").as_uri()
        context = mp.get_context("spawn") if self.device == "cuda" else SERVER  # the test files' imports may start CUDA
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.world, meeting, theirs, self.device), daemon=True)
            process.start()
            self.workers.append((process, ours))


def _work(rank: int, world: int, meeting: str, pipe: Any, device: str) -> None:
    import warnings

    import torch
    import torch.distributed as dist

    from lightning_lora.experimental import pulling_group
    from tests.distributed import nets

    gc.freeze()  # collections of garbage pass over what the server imported
    gc.set_threshold(20_000, 20, 50)  # as in tests/conftest.py
    pulling_group.SMALL = 300  # bytes: the networks here are tiny
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    os.environ.update(environment, WORLD_SIZE=str(world))
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        seed_no_gpus()
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=meeting, rank=rank, world_size=world)
    while True:
        function, args = pipe.recv()
        os.environ.update(environment, WORLD_SIZE=str(world))  # Lightning's teardown removes some of these
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
        nets.Net.checkpointing = None  # a run may have set it, or a seed, with which Lightning begins later runs
        os.environ.pop("PL_GLOBAL_SEED", None)
