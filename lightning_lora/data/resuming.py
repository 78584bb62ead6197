"""Resume a run within an epoch: the DataLoader begins after the batches that were trained on.

Lightning saves and loads the state of a loader. It loads the state too late if ``configure_optimizers`` asks for the number of steps,
because that makes the loader. So the data module saves the position too, and its loaders share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override


class Position:
    """A run's position in the epoch. A data module and all loaders that Lightning makes from its own share one.

    It is saved as the number of rows that all processes took. So a run on another number of processes goes on after these rows. Each
    process takes every n-th row of one order, as Lightning's distributed samplers do.

    Attributes:
        given: Number of batches of this epoch that each process took.
        length: Number of batches of this epoch, per process; None of a stream without an end.
        saved: Rows of the epoch in which the next pass begins; None if it begins at the first.
    """

    def __init__(self) -> None:
        self.given, self.rows = 0, 0
        self.length: int | None = 0
        self.saved: int | None = None

    def begin(self, length: int | None, rows: int) -> int:
        """Begin a pass over ``length`` batches of ``rows`` rows, those of all processes. Return how many batches were trained on before."""
        skip = (self.saved or 0) // rows
        self.given, self.length, self.rows, self.saved = 0, length, rows, None
        return skip

    def state_dict(self) -> dict[str, int]:
        """Return the position in rows, 0 at the end of an epoch."""
        # Of a stream, Lightning takes one batch more than it trained on, to know whether there is one.
        done = max(0, self.given - 1) if self.length is None else self.given % max(1, self.length)
        return {"rows": done * self.rows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next pass behind these rows. If they end inside a batch, its first rows are taken again."""
        self.saved = state["rows"]


class ResumableLoader(DataLoader):
    """``DataLoader`` that begins where its position says.

    The order of the rows has to be the same again. That of `LengthGroupedSampler` follows from its seed, its batch size and the epoch.

    Args:
        dataset: See ``DataLoader``.
        position: Counts the batches.
        **options: See ``DataLoader``.
    """

    def __init__(self, dataset: Any, position: Position, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.position = position

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skip = self.position.begin(None if isinstance(self.dataset, IterableDataset) else len(self), self._rows)
        for batch in super().__iter__():
            self.position.given += 1
            if self.position.given > skip:
                yield batch

    @property
    def resumed_at(self) -> int | None:
        """Batches that the next pass leaves out; None if it begins at the first. `LoRACallback` sets Lightning's count to it."""
        return None if self.position.saved is None else self.position.saved // self._rows

    @property
    def _rows(self) -> int:
        """Rows of one batch of all processes."""
        return int(self.batch_size or 1) * int(getattr(self.sampler, "num_replicas", getattr(self.dataset, "world", 1)))

    def state_dict(self) -> dict[str, int]:
        """Return the position, for Lightning, which warns of loaders without."""
        return self.position.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Load the position."""
        self.position.load_state_dict(state)
