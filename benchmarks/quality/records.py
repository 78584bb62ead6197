"""Records of trials: read them, gather those that differ in seed and learning rate only, choose the rate, say mean and spread.

A record is one line of JSON, as :mod:`benchmarks.quality.trial` writes it: the fields of a trial, ``val`` and ``test`` (null for a trial
that leaves the test rows alone), ``loss``, ``trainable``, ``seconds``, ``error``, ``device``, ``versions`` and ``commit``.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]
METRICS = ("accuracy", "bleu", "loss")  # the first that a task has is the one it is judged by
LESS_IS_BETTER = frozenset({"loss", "perplexity"})


@dataclass(frozen=True)
class Row:
    """Trials that differ in seed and learning rate only.

    Attributes:
        task, base, method: as in a record.
        config: the trial's config, flat: ``lora.rank`` → 8.
        records: those of it that did not fail.
    """

    task: str
    base: str
    method: str
    config: dict[str, Any]
    records: list[Record] = field(default_factory=list)

    def get(self, field: str) -> Any:
        """Return a field of the config, or "method"; None if there is none."""
        return self.method if field == "method" else self.config.get(field)

    @property
    def rates(self) -> dict[Any, list[Record]]:
        """Learning rate → records, in the order of the rates."""
        rates = sorted({record["lr"] for record in self.records}, key=lambda rate: (isinstance(rate, str), rate))
        return {rate: [record for record in self.records if record["lr"] == rate] for rate in rates}

    @property
    def metric(self) -> str:
        """Name of the metric that it is judged by."""
        return metric_of((tested(self.records) or self.records)[0])

    @property
    def lr(self) -> Any:
        """The chosen rate: of those with test results the one that is best on the validation rows, on average over its records."""
        rates = {rate: records for rate, records in self.rates.items() if tested(records)} or self.rates
        return min(rates, key=lambda rate: mean([record["val"]["loss"] for record in rates[rate]]))

    @property
    def split(self) -> str:
        """The rows of data that its results are on: "test", or "val" if its trials read no test rows."""
        return "test" if tested(self.records) else "val"

    @property
    def chosen(self) -> list[Record]:
        """The records at the chosen rate, those with test results if there are any, in the order of their seeds."""
        records = self.rates[self.lr]
        return sorted(tested(records) or records, key=lambda record: record["seed"])

    def values(self, metric: str | None = None, split: str | None = None) -> list[float]:
        """Return a metric at the chosen rate, on the rows of `split`."""
        return [record[split or self.split][metric or self.metric] for record in self.chosen]


def read_records(files: Iterable[Path]) -> list[Record]:
    """Return the records of JSON-lines files.

    Raises:
        ValueError: a line is no record. The message names file and line.
    """
    records = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{number} is no JSON ({error})") from error
            if not isinstance(record, dict) or "study" not in record:
                raise ValueError(f"{file}:{number} is no record: it has no 'study'")
            records.append(record)
    return records


def rows_of(records: Iterable[Record], study: str) -> list[Row]:
    """Return the rows of a study, in the order in which they first appear."""
    rows: dict[str, Row] = {}
    for record in records:
        if record["study"] == study and not record.get("error"):
            config = flat(record["config"])
            row = Row(record["task"], record["base"], record["method"], config)
            key = json.dumps([row.task, row.base, row.method, config], sort_keys=True)
            rows.setdefault(key, row).records.append(record)
    return list(rows.values())


def varied(rows: Sequence[Row]) -> list[str]:
    """Return the fields of the configs that tell rows of the same method apart, in the order in which they appear."""
    names = list(dict.fromkeys(name for row in rows for name in row.config))
    methods = {row.method for row in rows}
    return [name for name in names if any(len({json.dumps(r.config.get(name)) for r in rows if r.method == m}) > 1 for m in methods)]


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config as one level: ``{"lora": {"rank": 8}}`` is ``{"lora.rank": 8}``."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return leaves


def tested(records: Iterable[Record]) -> list[Record]:
    """Return the records with results on the test rows."""
    return [record for record in records if record.get("test")]


def metric_of(record: Record) -> str:
    """Return the name of the metric that a record is judged by."""
    scores = record.get("test") or record["val"]
    return next(name for name in METRICS if scores.get(name) is not None)


def mean(values: Sequence[float]) -> float:
    """Return the mean; infinity if a value is missing, as of a trial whose loss was not finite."""
    return float("inf") if any(value is None for value in values) else statistics.fmean(values)


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample, 0 for one value; infinity as :func:`mean`."""
    if any(value is None for value in values):
        return float("inf")
    return statistics.stdev(values) if len(values) > 1 else 0.0
