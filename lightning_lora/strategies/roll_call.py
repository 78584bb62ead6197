"""If one process raises, end the others too, each with an error that names the cause.

A process that raises leaves the others in a collective. They then fail with an error about a socket, or wait until the process group's
timeout, and none says why. A process that hangs is never named either.

So the processes tell each other through the key-value store with which they started. A process that raises writes its error there, and
waits a few seconds for the others. If they raise too, none waits for another. If not, they may wait for this process, so its process groups
are aborted. A process that fails after that reads in the store which rank raised first, and which ranks are silent.

A collective of gloo fails when a member has ended, or when its group is aborted and nothing holds it. One of NCCL does not fail: there a
thread looks into the store and aborts its own side. How long a collective waits for a process that hangs is the strategy's ``timeout``,
such as ``DDPStrategy(timeout=timedelta(minutes=2))``.

Without ``torchrun`` the store is the first process's, and ends with it. The others then say so.
"""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

import torch

from lightning_lora.utils.messages import append_line
from lightning_lora.utils.sharding import is_distributed
from lightning_lora.utils.torch_private import abort_process_groups, default_store

GRACE = 5.0  # seconds for the others to raise what this process raised
_POLL = 0.05  # seconds between two looks into the store


class RollCall:
    """Collects the errors of one run, by rank. Every process makes one at the same place, before the run can fail."""

    def __init__(self) -> None:
        name = [uuid.uuid4().hex]
        torch.distributed.broadcast_object_list(name)
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._store: Any = torch.distributed.PrefixStore(f"lightning_lora/{name[0]}", default_store())
        self._done = threading.Event()
        if torch.distributed.get_backend() == "nccl":
            threading.Thread(target=self._watch, name="lightning_lora roll call", daemon=True).start()

    def answer(self, exception: BaseException) -> None:
        """Tell the others what this process raised, and free them if they wait. Append which rank was first, and which are silent."""
        if self._done.is_set():
            return
        self._done.set()
        try:
            self._tell(exception)
        except torch.distributed.DistError:
            if is_distributed():
                abort_process_groups()
            if isinstance(exception, Exception):
                append_line(exception, "Rank 0 ended, or its launcher: the store for the errors of all processes is gone.")

    def _tell(self, exception: BaseException) -> None:
        first = self._store.add("raised", 1) == 1
        self._store.set(str(self.rank), f"{type(exception).__qualname__}: {exception}")
        if first:
            self._store.set("first", str(self.rank))
        silent = self._silent()
        if silent and is_distributed():
            self._store.set("aborted", "")
            abort_process_groups()
            silent = self._silent()
        if not isinstance(exception, Exception):  # an interrupt, or an exit whose argument is its code
            return
        if not first and self._store.check(["first", "aborted"]):  # else all raised by themselves
            other = int(self._store.get("first"))
            append_line(exception, f"Rank {other} raised first: {self._store.get(str(other)).decode(errors='replace')}")
        if silent:
            ranks = ", ".join(map(str, silent))
            append_line(exception, f"Rank {ranks} did not raise within {2 * GRACE:g} s: it hangs, ended, or waits for this process.")

    def close(self) -> None:
        """Stop watching, at the end of the run."""
        self._done.set()

    def _silent(self) -> list[int]:
        """Wait until every process has written its error. Return the ranks that have not in time."""
        deadline = time.monotonic() + GRACE
        while True:
            silent = [rank for rank in range(self.world) if not self._store.check([str(rank)])]
            if not silent or time.monotonic() > deadline:
                return silent
            time.sleep(_POLL)

    def _watch(self) -> None:
        """Abort a collective of this process that another process will never join."""
        while not self._done.wait(1.0):
            try:
                raised = self._store.check(["first"])
            except torch.distributed.DistError:  # the process that held it has ended
                raised = True
            if raised:
                if not self._done.wait(GRACE) and is_distributed():
                    abort_process_groups()
                return
