"""A DataLoader that a run resumes within an epoch: it begins behind the batches that were trained on.

Lightning saves and loads the state of a loader, but loads it too late if ``configure_optimizers`` asks how many steps there will be, for
that makes the loader. So the data module saves the position too, and its loaders share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override


class Position:
    """Where a run is in the epoch: shared by a data module and all loaders that Lightning makes of its own.

    Attributes:
        given: Batches of this epoch that were given out.
        length: Batches of this epoch, on each process.
    """

    def __init__(self) -> None:
        self.given, self.length = 0, 0
        self._saved: tuple[int, int] | None = None  # where the next pass begins

    def begin(self, length: int) -> int:
        """Begin a pass over ``length`` batches; return how many of them were trained on before."""
        skip, of = self._saved or (0, length)
        if skip and of != length:
            rank_zero_info(f"The epoch begins anew: it has {length} batches, {of} when the checkpoint was saved.")
            skip = 0
        self.given, self.length, self._saved = 0, length, None
        return skip

    def state_dict(self) -> dict[str, int]:
        """Return the position, 0 at the end of an epoch, and the epoch's length."""
        return {"batches": self.given % max(1, self.length), "length": self.length}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next pass at this position."""
        self._saved = state["batches"], state["length"]


class ResumableLoader(DataLoader):
    """``DataLoader`` that begins where its position says.

    The order of the rows has to be the same again. That of `LengthGroupedSampler` follows from its seed and the epoch.

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
        skip = self.position.begin(len(self))
        for batch in super().__iter__():
            self.position.given += 1
            if self.position.given > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position, for Lightning, which warns of loaders without."""
        return self.position.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Load the position."""
        self.position.load_state_dict(state)
