"""If one process raises, end the others too, each with an error that names the cause.

A process that raises leaves the others in a collective. They then fail with an error about a socket, or wait until the process group's
timeout, and none says why. A process that hangs is never named either.

So the processes tell each other through the key-value store with which they started. A process that raises writes its error there, and
waits a few seconds for the others. If they raise too, none waits for another. If not, they may wait for this process, so its process groups
are aborted. A process that fails after that reads in the store which rank raised first, and which ranks are silent.

A collective of gloo fails when a member has ended, or when its group is aborted and nothing holds it. One of NCCL does not fail: there a
thread looks into the store and aborts its own side.

A process that hangs raises nothing. So a thread of each process writes into the store where its process stands
(:mod:`lightning_lora.strategies.standing`). If a process stands still for half as long as a collective waits, or for ``LONGEST`` seconds,
its thread logs which rank hangs, and where. This ends nothing. It needs no collective, so it is the same under gloo and NCCL. How long a
collective waits is the strategy's ``timeout``, such as ``DDPStrategy(timeout=timedelta(minutes=2))``.

Without ``torchrun`` the store is the first process's, and ends with it. The others then say so.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import torch

from lightning_lora.strategies.standing import Standing, hanging
from lightning_lora.utils.messages import append_line
from lightning_lora.utils.sharding import is_distributed
from lightning_lora.utils.torch_private_parallel import abort_process_groups, default_store

GRACE = 5.0  # seconds for the others to raise what this process raised
LONGEST = 300.0  # seconds; a process that stands still for longer is named, however long collectives may wait
_POLL = 0.05  # seconds between two looks into the store
_LOG = logging.getLogger(__name__)


class RollCall:
    """Collects the errors of one run, by rank. Every process makes one at the same place, before the run can fail.

    Args:
        position: returns the batch that the run has reached, as numbers that grow.
        timeout: for how many seconds a collective waits.
    """

    def __init__(self, position: Callable[[], list[int]], timeout: float) -> None:
        name = [uuid.uuid4().hex]
        torch.distributed.broadcast_object_list(name)
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._prefix = f"lightning_lora/{name[0]}"
        self._store: Any = torch.distributed.PrefixStore(self._prefix, default_store())
        self._done = threading.Event()
        self._standing, self._patience = Standing(position), min(timeout / 2, LONGEST)
        self._told: Any = None  # the batch at which this process has named the ranks that hang
        self._aborts = torch.distributed.get_backend() == "nccl"
        self._thread = threading.Thread(target=self._watch, name="lightning_lora roll call", daemon=True)
        if self.world > 1:
            self._thread.start()

    def answer(self, exception: BaseException) -> None:
        """Tell the others what this process raised, and free them if they wait. Append which rank was first, and which are silent."""
        if self._done.is_set():
            return
        self._done.set()
        try:
            self._tell_error(exception)
        except torch.distributed.DistError:
            if is_distributed():
                abort_process_groups()
            if isinstance(exception, Exception):
                append_line(exception, "Rank 0 ended, or its launcher: the store for the errors of all processes is gone.")

    def _tell_error(self, exception: BaseException) -> None:
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
            for rank, record in self._records(silent, self._store).items():
                append_line(exception, f"Rank {rank} was last seen at {record['place']}.")

    def close(self) -> None:
        """Stop watching, at the end of the run."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _silent(self) -> list[int]:
        """Wait until every process has written its error. Return the ranks that have not in time."""
        deadline = time.monotonic() + GRACE
        while True:
            silent = [rank for rank in range(self.world) if not self._store.check([str(rank)])]
            if not silent or time.monotonic() > deadline:
                return silent
            time.sleep(_POLL)

    def _watch(self) -> None:
        """Look at this process and into the store until the run ends. Under NCCL, abort a collective that another process never joins."""
        raised = False
        try:
            store = torch.distributed.PrefixStore(self._prefix, default_store().clone())  # a call of the other thread may hold the first
            while not raised:
                if self._done.wait(min(1.0, self._patience / 5)):
                    return
                self._say_where(store)
                raised = self._aborts and store.check(["first"])
        except torch.distributed.DistError:  # the process that holds the store has ended; gloo's next collective says so
            raised = self._aborts
        if raised and not self._done.wait(GRACE) and is_distributed():
            abort_process_groups()

    def _say_where(self, store: Any) -> None:
        """Write where this process stands. Name the ranks that hang if it has stood there for too long, and none has named them yet."""
        stood = self._standing.look()
        record = self._standing.record()
        store.set(f"at {self.rank}", json.dumps(record))
        if stood > self._patience and self._told != record["position"]:
            self._told = record["position"]
            if store.add(f"told {record['position']}", 1) == 1:
                self._name_hanging(stood, store)

    def _name_hanging(self, stood: float, store: Any) -> None:
        """Log which ranks hang, and where all stand."""
        self._done.wait(self._patience / 2)  # the others write where they are now
        records = self._records(range(self.world), store)
        there = "; ".join(f"rank {rank} at {record['place']}" for rank, record in records.items())
        ranks = ", ".join(map(str, hanging(records)))
        lost = [str(rank) for rank in range(self.world) if rank not in records]
        gone = f" Rank {', '.join(lost)} never said where it is." if lost else ""
        _LOG.warning("Rank %s hangs: for %.0f s the processes have not moved: %s.%s", ranks, stood, there, gone)

    @staticmethod
    def _records(ranks: Iterable[int], store: Any) -> dict[int, dict[str, Any]]:
        """Return where the processes stand, as far as they have said so."""
        said = [rank for rank in ranks if store.check([f"at {rank}"])]
        return {rank: json.loads(store.get(f"at {rank}")) for rank in said}
