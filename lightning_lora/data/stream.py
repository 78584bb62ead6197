"""Training rows that are read and encoded while the model trains, for data that is larger than memory or still being downloaded.

A stream has no end: when the source ends, it begins anew in another order. So all processes have a next batch at every step, however
many rows each of them leaves out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from typing_extensions import override

from lightning_lora.data.encoding import Encode
from lightning_lora.data.reading import PlacedRow
from lightning_lora.data.records import NothingToLearn

BUFFER = 1000  # examples of which the next one is drawn


class Stream(IterableDataset):
    """The examples of a source without an end.

    Every process, and every worker of its loader, reads all rows and encodes its share of them.

    Args:
        read: Begins a pass over the rows.
        encode: See `lightning_lora.data.encoding`.
        seed: Seed of the order.
        rank: Number of this process.
        world: Number of processes.
        buffer: Examples of which the next one is drawn: rows stay near their place in the source.
    """

    def __init__(
        self, read: Callable[[], Iterator[PlacedRow]], encode: Encode, seed: int, rank: int = 0, world: int = 1, buffer: int = BUFFER
    ) -> None:
        self.read, self.encode, self.seed, self.buffer = read, encode, seed, buffer
        self.rank, self.world = rank, world
        self.positions: int | None = None  # the model's, once it is known; None: it has no limit

    @override
    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        part, parts = self.rank * workers + number, self.world * workers
        draw = random.Random(f"{self.seed} {part}")
        waiting: list[Any] = []
        for example in self._examples(part, parts):
            waiting.append(example)
            if len(waiting) >= self.buffer:
                i = draw.randrange(len(waiting))
                waiting[i], waiting[-1] = waiting[-1], waiting[i]
                yield waiting.pop()

    def _examples(self, part: int, parts: int) -> Iterator[Any]:
        for passed in count():
            found = 0
            for place, row in islice(self.read(), part, None, parts):
                try:
                    examples, happened = self.encode(row)
                except NothingToLearn:
                    continue
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from error
                if "lost" in happened:
                    raise ValueError(
                        f"{place}: the row loses its answer to max_length{happened['lost']}; raise data.max_length, or set "
                        "data.long_rows: drop"
                    )
                for example in examples:
                    if self.positions is not None and len(example) > self.positions:
                        raise ValueError(
                            f"{place}: the row has {len(example)} tokens, and the model's position embeddings end at {self.positions}; set"
                            f" data.max_length: {self.positions}"
                        )
                found += len(examples)
                yield from examples
            if not found and not passed:
                raise ValueError(
                    f"of the training rows, none is left for process {part + 1} of {parts}; give more rows, or fewer processes"
                )


def endless(read: Callable[[], Iterator[PlacedRow]], encode: Encode, seed: int, trainer: Any = None) -> Stream:
    """Return a process's stream of training examples.

    Args:
        read: See `Stream`, as for ``encode`` and ``seed``.
        encode: See there.
        seed: See there.
        trainer: The Trainer, if there is one.

    Raises:
        ValueError: Nothing would end the run, each epoch would have the same rows, or the first row cannot be encoded.
    """
    if trainer is not None:
        _check_end(trainer)
    next(iter(Stream(read, encode, seed, buffer=1)))  # an error before the first step
    return Stream(read, encode, seed, *((trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)))


def _check_end(trainer: Any) -> None:
    """Refuse a run without an end, and one whose epochs begin the stream anew. A run of one epoch, or on purpose on few batches, may."""
    limit, steps = trainer.limit_train_batches, trainer.max_steps
    if isinstance(limit, float):
        if steps < 0:
            raise ValueError("data.streaming has no end; set trainer.max_steps")
        return
    once = trainer.max_epochs == 1 or trainer.overfit_batches or 0 <= steps * trainer.accumulate_grad_batches <= limit
    if not once:
        raise ValueError(
            f"trainer.limit_train_batches={limit} begins data.streaming anew in each epoch, with the same rows; set trainer.max_steps "
            f"instead, and to validate as often trainer.val_check_interval: {limit} with check_val_every_n_epoch: null"
        )
