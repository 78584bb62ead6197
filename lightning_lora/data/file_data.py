"""The base of all data modules that read rows from files: sources, splits, encoding once, loaders that resume."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_lora.data.batching import Example, LengthGroupedSampler
from lightning_lora.data.encoding import encode_rows
from lightning_lora.data.formats import check_format, to_record
from lightning_lora.data.reading import PlacedRow, read_rows
from lightning_lora.data.records import Record
from lightning_lora.data.resuming import Position, ResumableLoader
from lightning_lora.data.store import Examples
from lightning_lora.ops.cross_entropy import IGNORE

Source = str | list[str]
STAGES = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}


class FileDataModule(LightningDataModule, ABC):
    """Rows of files, encoded by the task's tokenizer (so the model is named once, in the task).

    A subclass says in `records` which records it takes, in `example` what a row becomes, and defines `encode` and `collate`.

    A source is a file (jsonl, json, csv, tsv, parquet), a folder that the library ``datasets`` saved, a hub id (``owner/name``, or with a
    split ``owner/name:train[:1000]``), or a list of these. `lightning_lora.data.formats` has the formats of rows.

    A run that resumes inside an epoch goes on with the next rows. Their order depends on ``seed``, ``batch_size`` and the epoch. On several
    processes Lightning shuffles it once more, and each takes every n-th row: the order is the same on any number above one.

    Args:
        train: Training rows.
        val: Validation rows; or the share of the training rows to take for it, drawn by ``seed``. Without it there is no validation.
        test: Test rows.
        predict: Rows to answer; the test rows by default.
        batch_size: Rows per batch.
        max_length: Longest row, in tokens. Longer rows are cut, and counted.
        seed: Seed of the order of the training rows, and of the share for validation.
        pad_to_multiple_of: Pad batches to lengths that are multiples of it, except in prediction. A compiler then sees few sizes.
        format: Format of the rows; "auto" recognises it by their keys.
        columns: Names of columns that differ from the format's, such as ``{response: reply}``.
        subset: Configuration of a hub data set.
        num_workers: Processes that make batches; 0 makes them in the training process.

    Raises:
        ValueError: A source is missing, empty or malformed, or cutting leaves a row with nothing to learn. The message names file and line.
    """

    records: ClassVar[tuple[type, ...]] = ()
    example: ClassVar[type] = Example

    def __init__(
        self,
        train: Source | None = None,
        val: float | Source | None = None,
        test: Source | None = None,
        predict: Source | None = None,
        batch_size: PositiveInt = 8,
        max_length: PositiveInt = 1024,
        seed: int = 0,
        pad_to_multiple_of: PositiveInt = 1,
        format: str = "auto",
        columns: dict[str, str] | None = None,
        subset: str | None = None,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        check_format(format)
        self.sources = {"train": train, "val": val, "test": test, "predict": predict or test}
        self.format, self.columns, self.subset = format, columns, subset
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed
        self.pad_to_multiple_of, self.num_workers = pad_to_multiple_of, num_workers
        self.share = _share(val)
        self.examples: dict[str, Examples] = {}
        self.position = Position()
        self._tokenizer: Any = None

    # What a subclass defines.

    @abstractmethod
    def encode(self, record: Record, split: str) -> Sequence[Any]:
        """Return the examples of a record: instances of `example`, usually one.

        Raises:
            ValueError: The record cannot be encoded. The caller adds its place.
        """

    @abstractmethod
    def collate(self, examples: Sequence[Any], split: str) -> dict[str, Any]:
        """Return the batch of some examples."""

    def fits(self, example: Any, split: str) -> str | None:
        """Cut an example to ``max_length``, in place. Return what happened to it: None, "cut", or "lost" if nothing to learn is left."""
        if len(example) <= self.max_length:
            return None
        lost = split == "predict" or bool(example.rivals)  # half a prompt or half a choice cannot be judged
        del example.ids[self.max_length :], example.labels[self.max_length :]
        return "lost" if lost or all(label == IGNORE for label in example.labels) else "cut"

    # From sources to examples.

    @property
    def tokenizer(self) -> Any:
        """The task's tokenizer.

        Raises:
            ValueError: The LightningModule has none.
        """
        if self._tokenizer is not None:
            return self._tokenizer
        module = self.trainer.lightning_module if self.trainer is not None else None
        tokenizer = getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                f"{type(self).__name__} takes its tokenizer from the LightningModule, but {type(module).__name__} has no "
                "`tokenizer`; set self.tokenizer there, or use one of the tasks"
            )
        return tokenizer

    @override
    def setup(self, stage: str) -> None:
        for split in STAGES[stage]:
            missing = self.sources[split] is None
            if missing and (stage, split) == ("fit", "val"):
                continue  # only validation within fit is optional
            if missing:
                raise ValueError(f"data.{split} is not set; {getattr(stage, 'value', stage)} needs a file there")
            if split not in self.examples:
                self.examples[split] = self.load(split)

    def load(self, split: str) -> Examples:
        """Read and encode the rows of a split.

        Raises:
            ValueError: See the class.
        """
        sources, rows = self._rows(split)
        name = ", ".join(sources)
        if not rows:
            raise ValueError(f"data.{split}={name!r} is empty; it needs at least one row")
        found, counts, places = encode_rows(rows, partial(self._encode, split=split), f"{split}: {Path(name).name}")
        if counts["lost"]:
            more = ", ..." if counts["lost"] > len(places["lost"]) else ""
            raise ValueError(
                f"{counts['lost']} of {len(rows)} rows lose their answer to max_length={self.max_length}: "
                f"{', '.join(places['lost'])}{more}; raise data.max_length or shorten their prompts"
            )
        if counts["cut"]:
            rank_zero_warn(f"{name}: {counts['cut']} of {len(rows)} rows are cut to max_length={self.max_length} tokens")
        examples = Examples.pack(self.example, found)
        if not len(examples):
            raise ValueError(f"data.{split}={name!r}: all {len(rows)} rows are empty")
        self._say(split, name, examples, len(rows), counts)
        return examples

    def _rows(self, split: str) -> tuple[list[str], list[PlacedRow]]:
        """Return the sources of a split and its rows."""
        shared = self.share is not None and split in ("train", "val")
        slot = "train" if shared else split
        source = self.sources[slot]
        sources = [source] if isinstance(source, str) else list(source or [])  # type: ignore[arg-type]
        rows = [row for one in sources for row in read_rows(one, slot, self.subset)]
        if shared and rows:
            taken = round(self.share * len(rows))  # type: ignore[operator]
            if not 0 < taken < len(rows):
                raise ValueError(f"data.val={self.share} of {len(rows)} training rows are {taken}: both parts need a row")
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
            rows = [rows[i] for i in sorted(order[:taken] if split == "val" else order[taken:])]
        return sources, rows

    def _encode(self, row: Any, split: str) -> tuple[list[Any], dict[str, str]]:
        """Encode one row. Return its examples, and what happened to it with a note."""
        record = to_record(row, self.format, self.columns, needs_answer=split != "predict")
        if not isinstance(record, self.records):
            names = ", ".join(kind.__name__ for kind in self.records)
            raise ValueError(f"{type(self).__name__} takes rows of {names}, and this is a {type(record).__name__}; set data.format or data")
        examples = list(self.encode(record, split))
        happened = {}
        for example in examples:
            size, thing = len(example), self.fits(example, split)
            if thing is not None:
                happened[thing] = f" ({size} tokens)"
        return examples, happened if examples else {"empty": ""}

    def _say(self, split: str, name: str, examples: Examples, rows: int, counts: Any) -> None:
        lengths = torch.tensor(examples.lengths)
        parts = [f"{rows} rows"]
        parts += [f"{counts['empty']} empty"] if counts["empty"] else []
        parts += [f"{len(examples)} examples"] if len(examples) != rows else []
        median, longest = int(lengths.median()), int(lengths.max())
        rank_zero_info(f"data.{split} {name}: {', '.join(parts)}; {median} tokens in the median row, {longest} in the longest.")

    # From examples to batches.

    def batching(self, split: str) -> dict[str, Any]:
        """Return how examples become batches, as arguments of ``DataLoader``: order and size in ``sampler``, content in ``collate_fn``."""
        options: dict[str, Any] = {"batch_size": self.batch_size, "collate_fn": partial(self.collate, split=split)}
        if split != "predict":  # which keeps the file's order
            epoch = (lambda: self.trainer.current_epoch) if split == "train" else None  # type: ignore[union-attr]
            options["sampler"] = LengthGroupedSampler(self.examples[split].lengths, self.batch_size, epoch, self.seed)
        return options

    def loader(self, split: str) -> DataLoader:
        """Return the loader of a split."""
        options: dict[str, Any] = {"num_workers": self.num_workers, **self.batching(split)}
        if self.num_workers:
            options["multiprocessing_context"] = "fork"  # `collate` is a method of this module, which cannot be pickled
        rows = options.pop("dataset", self.examples[split])
        return ResumableLoader(rows, self.position, **options) if split == "train" else DataLoader(rows, **options)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch."""
        return self.position.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin the next epoch at a position."""
        self.position.load_state_dict(state_dict)

    @override
    def train_dataloader(self) -> DataLoader:
        return self.loader("train")

    @override
    def val_dataloader(self) -> DataLoader | list:
        return self.loader("val") if "val" in self.examples else []

    @override
    def test_dataloader(self) -> DataLoader:
        return self.loader("test")

    @override
    def predict_dataloader(self) -> DataLoader:
        return self.loader("predict")


def _share(val: Any) -> float | None:
    """Return ``data.val`` if it is a number."""
    try:
        share = float(val)
    except (TypeError, ValueError):
        return None
    if not 0 < share < 1:
        raise ValueError(f"data.val={val!r} must be a share of the training rows between 0 and 1, or name a file")
    return share
