"""Let all processes stop after the same batch when one of them was told to stop.

Each process adds its flag to one small reduction per batch. The result is read ``LAG`` batches later. Reading it at once would make the
process wait for its GPU in every batch. ``LAG`` batches later the GPU has finished the reduction, and still has batches to compute. Every
process reads the same result after the same batch, so no process stops while another waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist

LAG = 2  # batches


class AgreedStop:
    """Exchange the flags of one run. Every process has to make one, and to call it after every batch.

    Args:
        device: where the process group reduces: the strategy's root device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pending: deque[Callable[[], bool]] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def after_batch(self, told: bool) -> bool:
        """Return True if any process was told to stop ``LAG`` batches ago or earlier.

        Args:
            told: True if this process was told to stop.
        """
        flag = torch.full((1,), int(told), dtype=torch.int32, device=self.device)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        assert work is not None  # the process group has this process
        if self._stream is None:
            self._pending.append(lambda: work.wait() and bool(flag))
        else:
            self._pending.append(self._read_beside(flag, work, self._stream))
        return len(self._pending) > LAG and self._pending.popleft()()

    def close(self) -> None:
        """Wait for the unread reductions at the end of the run."""
        while self._pending:
            self._pending.popleft()()

    @staticmethod
    def _read_beside(flag: torch.Tensor, work: dist.Work, stream: torch.cuda.Stream) -> Callable[[], bool]:
        """Copy the flag on a stream of its own, so that reading it waits for nothing that was launched later."""
        result = torch.empty(1, dtype=torch.int32, pin_memory=True)
        with torch.cuda.stream(stream):
            work.wait()  # this stream waits, the process does not
            result.copy_(flag, non_blocking=True)
            flag.record_stream(stream)
            done = torch.cuda.Event()
            done.record(stream)

        def read() -> bool:
            done.synchronize()
            return bool(result)

        return read
