"""A loader that goes on inside an epoch where a checkpoint was saved.

Lightning asks a training loader for its state when it saves, and gives it back when it resumes. The state counts the rows of all
processes in this epoch. So a run on another number of processes goes on after them, if its sampler's order does not depend on that
number: each process takes every n-th row of one order, as Lightning's distributed samplers do.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import BatchSampler, DataLoader


class ResumableBatches(BatchSampler):
    """A ``BatchSampler`` whose next epoch leaves its first ``skip`` batches out. It loads no row of them."""

    skip = 0

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        return islice(super().__iter__(), skip, None)


class ResumableLoader(DataLoader):
    """A ``DataLoader`` over :class:`ResumableBatches` with ``state_dict`` and ``load_state_dict``.

    ``batch_sampler`` must be of that class. Its length stays that of the full epoch.

    Attributes:
        resumed_at: batches that the epoch leaves out in which a run resumes; None if it did not resume. On another number of processes it
            is not the number of batches that were trained, so :class:`~lightning_lora.LoRACallback` sets Lightning's count to it.
    """

    resumed_at: int | None = None
    _done = 0  # batches of this epoch that were handed out, left out ones included

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._done = self._batches.skip
        for batch in super().__iter__():
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the number of rows of this epoch that all processes have had; 0 at its end."""
        return {"rows": self._done % len(self) * self._rows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next epoch after these rows. If they end inside a batch of all processes, its first rows come again."""
        self.resumed_at = self._batches.skip = state["rows"] // self._rows

    @property
    def _batches(self) -> ResumableBatches:
        assert isinstance(self.batch_sampler, ResumableBatches)
        return self.batch_sampler

    @property
    def _rows(self) -> int:
        """Rows of one batch of all processes."""
        return self._batches.batch_size * int(getattr(self._batches.sampler, "num_replicas", 1))
