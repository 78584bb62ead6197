"""Find out where the processes of a run stand, and which of them the others wait for.

A thread looks at the stack of the training thread and at the batch that it has reached. Both stay the same while a process hangs, and while
it waits in a collective for one that hangs. The process that hangs is behind the others, or stands outside of torch, where nobody waits.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

_TORCH = str(Path(torch.__file__).parent)


class Standing:
    """Watches the thread that makes it. Other threads look.

    Args:
        position: returns the batch that the run has reached, as numbers that grow.
    """

    def __init__(self, position: Callable[[], list[int]]) -> None:
        self._position, self._thread = position, threading.get_ident()
        self._seen: tuple[list[int], list[tuple[str, int | None, str]]] = ([], [])
        self._since = time.monotonic()
        self.look()

    def look(self) -> float:
        """Return for how many seconds the thread has stood at the same line of the same batch, as far as earlier looks show."""
        frame = sys._current_frames().get(self._thread)
        if frame is None:  # the thread has ended
            return 0.0
        stack = traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)
        seen = self._position(), [(line.filename, line.lineno, line.name) for line in stack]
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since

    def record(self) -> dict[str, Any]:
        """Return what the last look saw, as plain types."""
        position, stack = self._seen
        file, line, name = stack[0]
        short = "/".join(Path(file).parts[-2:])
        return {"position": position, "place": f"{short}:{line} ({name})", "in_torch": file.startswith(_TORCH)}


def hanging(records: Mapping[int, dict[str, Any]]) -> list[int]:
    """Return the ranks that the others wait for.

    Args:
        records: rank → what :meth:`Standing.record` returned there.
    """
    last = min(record["position"] for record in records.values())
    behind = [rank for rank, record in records.items() if record["position"] == last]
    return [rank for rank in behind if not records[rank]["in_torch"]] or behind
