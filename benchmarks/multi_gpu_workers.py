"""The processes of ``multi_gpu.py``: one a device, which stay over many rows, and are replaced after a failure."""

from __future__ import annotations

import multiprocessing as mp
import shutil
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import multi_gpu_runs as runs

GRACE = 10.0  # seconds: after one process failed, the others may wait for it in a collective for ever


class Workers:
    """Processes that stay over many rows: importing and NCCL's start take seconds. After a failure the next call starts new ones."""

    def __init__(self, world: int, cpu: bool) -> None:
        self.world, self.cpu = world, cpu
        self.members: list[tuple[Any, Any]] = []
        self.folder = ""
        self.variables: dict[str, str] = {}

    def under(self, variables: dict[str, str]) -> Workers:
        """These processes, started anew unless they have these environment variables."""
        if variables != self.variables:
            self.close()
        self.variables = variables
        return self

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
        """What each rank returned.

        Raises:
            RuntimeError: a rank raised, died or did not answer; all of them are gone then.
        """
        if not self.members:
            self._start()
        for _, pipe in self.members:
            pipe.send((function, args))
        waiting, results, errors = {pipe: rank for rank, (_, pipe) in enumerate(self.members)}, {}, []
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), GRACE if errors else max(0.0, deadline - time.monotonic()))
            if not ready:
                errors.append(f"no answer from ranks {sorted(waiting.values())}")
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    process = self.members[rank][0]
                    process.join(1.0)
                    ok, value = False, f"rank {rank} died, exit code {process.exitcode}"
                if ok:
                    results[rank] = value
                else:
                    errors.append(value)
        if errors:
            self.close()
            raise RuntimeError(next((error for error in errors if "died" in error), errors[0]))
        return [results[rank] for rank in range(self.world)]

    def close(self) -> None:
        for process, pipe in self.members:
            process.kill()
            process.join()
            pipe.close()
        self.members = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        # They meet over a file: a port that was free may be taken by the time they have started.
        self.folder = tempfile.mkdtemp()
        meeting = Path(self.folder, "meeting")
        context = mp.get_context("forkserver" if self.cpu else "spawn")  # CUDA cannot be forked
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=runs.work, args=(rank, self.world, meeting.as_uri(), theirs, self.cpu, self.variables))
            process.start()  # not a daemon, which may not start a loader's processes
            theirs.close()  # so that a process's death closes the pipe
            self.members.append((process, ours))
