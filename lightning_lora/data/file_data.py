"""The base of all data modules that read rows from files: sources, splits, encoding once, loaders that resume."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_lora.data.batching import Example, LengthGroupedSampler
from lightning_lora.data.cache import cache_folder, key_of, read_cache, settings_of, tokenizer_state, write_cache
from lightning_lora.data.encoding import Report, encode_rows
from lightning_lora.data.formats import check_format, to_record, unread
from lightning_lora.data.limits import check_limits, learned_positions
from lightning_lora.data.of_task import FromTask
from lightning_lora.data.reading import PlacedRow, read_rows
from lightning_lora.data.records import CALLED, Record
from lightning_lora.data.resuming import Position, ResumableLoader
from lightning_lora.data.shown import Part, by_token
from lightning_lora.data.splits import share_of, take_share
from lightning_lora.data.store import Examples
from lightning_lora.data.stream import Stream, endless
from lightning_lora.ops.cross_entropy import IGNORE

Source = str | list[str]
STAGES = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}


class FileDataModule(FromTask, ABC):
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
        max_length: Longest row, in tokens.
        seed: Seed of the order of the training rows, and of the share for validation.
        pad_to_multiple_of: Pad batches to lengths that are multiples of it, except in prediction. A compiler then sees few sizes.
        format: Format of the rows; "auto" recognises it by their keys.
        columns: Names of columns that differ from the format's, such as ``{response: reply}``.
        subset: Configuration of a hub data set.
        long_rows: Cut longer rows, drop them, or refuse them. What is cut or dropped is counted and said.
        cache: Keep the encoded rows, in this folder or in ``~/.cache/lightning_lora``. They are used again while the files' content, the
            tokenizer and the settings are the same.
        streaming: Read and encode the training rows while the model trains, for sources larger than memory. ``trainer.max_steps`` ends it.
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
        long_rows: Literal["cut", "drop", "refuse"] = "cut",
        cache: bool | str = True,
        streaming: bool = False,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        check_format(format)
        self.sources = {"train": train, "val": val, "test": test, "predict": predict or test}
        self.format, self.columns, self.subset = format, columns, subset
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed
        self.pad_to_multiple_of, self.num_workers = pad_to_multiple_of, num_workers
        self.long_rows, self.cache, self.share = long_rows, cache, share_of(val)
        if streaming and self.share is not None:
            raise ValueError(f"data.val={val} is a share of the training rows, which data.streaming never has as a whole; name a source")
        self.streaming = streaming
        self.examples: dict[str, Examples | Stream] = {}
        self.position = Position(self._limit)

    # What a subclass defines.

    @abstractmethod
    def encode(self, record: Record, split: str) -> Sequence[Any]:
        """Return the examples of a record: instances of `example`, usually one.

        It changes nothing in this object: other processes run it, and a cache may take its place.

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
        return "lost" if lost or all(label == IGNORE for label in example.labels[1:]) else "cut"  # nothing predicts a first token

    def parts(self, example: Any) -> Iterable[Part]:
        """Return an example as text in parts, each with whether it is learnt: for people."""
        return by_token(self.tokenizer, example.ids, example.labels)

    def read(self, source: str, slot: str, streaming: bool = False) -> Iterable[PlacedRow]:
        """Return the rows of a source, with their places."""
        return read_rows(source, slot, self.subset, streaming)

    # From sources to examples.

    @override
    def setup(self, stage: str) -> None:
        for split in STAGES[stage]:
            missing = self.sources[split] is None
            if missing and (stage, split) == ("fit", "val"):
                self.val_dataloader = None  # type: ignore[assignment, method-assign]
                continue  # only validation within fit is optional; an empty loader would make Lightning warn
            if missing:
                raise ValueError(f"data.{split} is not set; {getattr(stage, 'value', stage)} needs a file there")
            if split not in self.examples:
                self.examples[split] = self.stream() if self.streaming and split == "train" else self.load(split)

    @override
    def prepare_data(self) -> None:
        """Encode what this run needs in one process per machine, before the others find it in the cache."""
        if self.trainer is not None and self.trainer.world_size > 1 and self.cache:
            for split in STAGES[self.trainer.state.fn or "fit"]:
                if self.sources[split] is not None and not (self.streaming and split == "train"):
                    self.load(split, say=False)

    def load(self, split: str, say: bool = True) -> Examples:
        """Return the encoded rows of a split, from the cache if they are there.

        Args:
            split: "train", "val", "test" or "predict".
            say: Log what became of the rows.

        Raises:
            ValueError: See the class.
        """
        sources = self._sources(split)
        name = ", ".join(sources)
        whole_files = all(Path(source).is_file() for source in sources)
        rows = None if whole_files else self._rows(split, sources)
        file = self._cache_file(split, [Path(source) for source in sources] if rows is None else rows)
        kept = read_cache(file, self.example) if file is not None else None
        if kept is not None:
            examples, report = kept[0], Report(**kept[1])
        else:
            rows = self._rows(split, sources) if rows is None else rows
            if not rows:
                raise ValueError(f"data.{split}={name!r} is empty; it needs at least one row")
            examples, report = encode_rows(rows, partial(self._encode, split=split), self.example, f"data.{split}")
            report.unread = unread(rows[0][1], self.format, self.columns)
            report.check(f"data.{split}={name!r}", len(examples), self.max_length)
            if file is not None:
                write_cache(file, examples, vars(report))
        if say:
            report.say(f"data.{split} {name}", examples.lengths, self.max_length, cached=kept is not None)
        return examples

    def stream(self) -> Stream:
        """Return the training rows as a stream; see `endless`."""
        sources = self._sources("train")
        return endless(
            lambda: chain.from_iterable(self.read(source, "train", streaming=True) for source in sources),
            partial(self._encode, split="train"),
            self.seed,
            self.trainer,
        )

    def _sources(self, split: str) -> list[str]:
        source = self.sources["train" if self.share is not None and split == "val" else split]
        return [source] if isinstance(source, str) else list(source or [])  # type: ignore[arg-type]

    def _cache_file(self, split: str, content: Sequence[Path] | Sequence[PlacedRow]) -> Path | None:
        """Return where the encoded rows are kept; None without a cache."""
        folder = cache_folder(self.cache)
        if folder is None:
            return None
        key = key_of(content, split, settings_of(self), tokenizer_state(self.tokenizer))
        return folder / f"{split}-{key}.safetensors"

    def _rows(self, split: str, sources: list[str]) -> list[PlacedRow]:
        """Read the rows of a split."""
        shared = self.share is not None and split in ("train", "val")
        rows = [row for one in sources for row in self.read(one, "train" if shared else split)]
        return take_share(rows, self.share, self.seed, split) if self.share is not None and shared else rows

    def record_of(self, row: Any, split: str) -> Record:
        """Return what a row means.

        Raises:
            ValueError: It has no known format, or is of a kind that this class does not take.
        """
        record = to_record(row, self.format, self.columns, needs_answer=split != "predict")
        if not isinstance(record, self.records):
            takes, name = " or ".join(CALLED[kind] for kind in self.records), type(self).__name__
            raise ValueError(
                f"{name} takes {takes}, and this row is {CALLED[type(record)]}; set data.format, or choose another data module"
            )
        return record

    def _encode(self, row: Any, split: str) -> tuple[list[Any], dict[str, str]]:
        """Encode one row. Return its examples, and what happened to it with a note."""
        examples, happened = [], {}
        for example in self.encode(self.record_of(row, split), split):
            size, thing = len(example), self.fits(example, split)
            if thing is not None:
                thing = thing if split == "predict" else {"cut": thing, "drop": "dropped", "refuse": "lost"}[self.long_rows]
                happened[thing] = f" ({size} tokens)"
            if thing != "dropped":
                examples.append(example)
        return examples, happened or ({} if examples else {"empty": ""})

    @override
    def teardown(self, stage: str) -> None:
        vars(self).pop("val_dataloader", None)  # see `setup`

    def batching(self, split: str) -> dict[str, Any]:
        """Return how examples become batches, as arguments of ``DataLoader``: order and size in ``sampler``, content in ``collate_fn``."""
        examples = self.examples[split]
        options: dict[str, Any] = {"batch_size": self.batch_size, "collate_fn": partial(self.collate, split=split)}
        if split != "predict" and isinstance(examples, Examples):  # which keeps the file's order
            epoch = (lambda: self.trainer.current_epoch) if split == "train" else None  # type: ignore[union-attr]
            options["sampler"] = LengthGroupedSampler(examples.lengths, self.batch_size, epoch, self.seed)
        return options

    def loader(self, split: str) -> DataLoader:
        """Return the loader of a split, whose rows the model can read."""
        rows, task = self.examples[split], getattr(self.trainer, "lightning_module", None)
        if isinstance(rows, Examples):
            check_limits(getattr(task, "model", None), getattr(task, "tokenizer", None), rows, f"data.{split}")
        else:
            rows.positions = learned_positions(getattr(task, "model", None))  # checked row by row
        options: dict[str, Any] = {"num_workers": self.num_workers, "pin_memory": self._pins(), **self.batching(split)}
        if self.num_workers:
            options["multiprocessing_context"] = "fork"  # `collate` is a method of this module, which cannot be pickled
        rows = options.pop("dataset", rows)
        return ResumableLoader(rows, self.position, **options) if split == "train" else DataLoader(rows, **options)

    def _pins(self) -> bool:
        """Return whether batches go to a GPU. From pinned memory they are copied while the process launches what comes next."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _limit(self) -> float:
        """Return how many training batches an epoch has at most."""
        return self.trainer.num_training_batches if self.trainer is not None else float("inf")

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
    def val_dataloader(self) -> DataLoader:
        return self.loader("val")

    @override
    def test_dataloader(self) -> DataLoader:
        return self.loader("test")

    @override
    def predict_dataloader(self) -> DataLoader:
        return self.loader("predict")
