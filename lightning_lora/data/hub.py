"""Read parquet files, folders that the library ``datasets`` saved, and data sets of the hub. All need the extra ``datasets``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_lora.storage.regular_files import WrongPath

SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # of these, a saved folder has at least one
_SPLIT = re.compile(r"(.+?):(\w[\w.+]*(?:\[[^\]]*\])?)")
_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
# The split that a data set usually has for each use.
SPLITS = {"train": "train", "val": "validation", "test": "test", "predict": "test"}


def names_dataset(source: str) -> bool:
    """Tell whether a source is a folder or may be a hub id, either with ``:split`` at its end or without."""
    name = _split_of(source, "train")[0]
    return Path(name).is_dir() or bool(_HUB_ID.fullmatch(name))


def read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a parquet file, each with ``file:row``.

    Raises:
        ImportError: The extra is not installed.
        ValueError: The file is damaged.
    """
    _require("pyarrow", f"{path}:")
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", {name: _without_nulls(value) for name, value in row.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file: {str(error).splitlines()[0]}") from error


def read_dataset(source: str, slot: str, subset: str | None = None, streaming: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a data set, each with ``name:row``.

    Args:
        source: A folder that ``save_to_disk`` wrote, a folder of data files, or a hub id; with ``:split`` at its end for another split than
            the usual one.
        slot: "train", "val", "test" or "predict".
        subset: The configuration, for data sets that have several.
        streaming: Read it while it is downloaded.

    Raises:
        ImportError: The extra is not installed.
        WrongPath: There is no such data set, or the hub cannot be reached.
        ValueError: The folder has no such split, or its files cannot be read.
    """
    name, split = _split_of(source, slot)
    folder = Path(name)
    what = f"data.{slot}={source!r}: this is a folder, and" if folder.is_dir() else f"data.{slot}={source!r}: no such file, and of the hub:"
    _require("datasets", what)
    import datasets
    import pyarrow

    try:
        if any((folder / file).is_file() for file in SAVED):
            rows = datasets.load_from_disk(name)
            if isinstance(rows, datasets.DatasetDict):
                if split not in rows:
                    raise ValueError(f"it has no split {split!r}, but {', '.join(rows)}; write {name}:SPLIT")
                rows = rows[split]
            rows = rows.to_iterable_dataset() if streaming else rows
        else:
            rows = datasets.load_dataset(name, subset, split=split, streaming=streaming)
        names = _label_names(rows.features or {})
        for number, row in enumerate(rows, start=1):  # a stream meets its errors here
            yield f"{source}:{number}", {name: _without_nulls(value) for name, value in _named(row, names).items()}
    except (ValueError, OSError, LookupError, TypeError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        reason = error.__cause__ or error if folder.is_dir() else error  # of a file that cannot be read, datasets says only that
        said = f"{what} {' '.join(str(reason).split())[:400]}"
        if folder.is_dir():
            raise ValueError(said) from error
        raise WrongPath(said) from error


def _label_names(features: dict[str, Any]) -> dict[str, list[str]]:
    """Return column → names of its labels, for columns that have a label, or a list of labels, as a number."""
    found = {column: getattr(getattr(feature, "feature", feature), "names", None) for column, feature in features.items()}
    return {column: names for column, names in found.items() if isinstance(names, list)}


def _named(row: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """Give labels their names; -1 is no label."""

    def name(label: Any, its: list[str]) -> Any:
        return [name(each, its) for each in label] if isinstance(label, list) else its[label] if label in range(len(its)) else None

    return {**row, **{column: name(row[column], its) for column, its in names.items() if column in row}}


def _without_nulls(value: Any) -> Any:
    """Leave out the null fields of nested objects: a column gives each object the fields of all, as to a tool call those of the others."""
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return {key: _without_nulls(each) for key, each in value.items() if each is not None} if isinstance(value, dict) else value


def _split_of(source: str, slot: str) -> tuple[str, str]:
    """Return the data set's name and the split."""
    named = _SPLIT.fullmatch(source)
    return (source, SPLITS[slot]) if Path(source).exists() or not named else (named[1], named[2])


def _require(package: str, what: str) -> None:
    if find_spec(package) is None:
        raise ImportError(f"{what} reading it needs the package {package}; pip install 'lightning-lora[datasets]'")
