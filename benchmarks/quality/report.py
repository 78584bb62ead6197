"""Write the page of evidence: tables and pictures from the records, findings from ``findings.md``, what others published.

    python -m benchmarks.quality.report benchmarks/records/quality/*.jsonl --out docs

writes ``docs/evidence.md`` and ``docs/images/evidence-*.svg``. It computes means and spreads; it judges nothing. The sentences that do are
written by hand in ``findings.md``, one heading a study, and stand before its table; ``published.md`` has what stands after it. What was not
run, or not to the end, is said.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.quality import pictures, tables
from benchmarks.quality.family import MEMBERS
from benchmarks.quality.records import Record, Row, read_records, rows_of, varied

FINDINGS, PUBLISHED = (Path(__file__).with_name(name) for name in ("findings.md", "published.md"))
RUN = "python -m benchmarks.quality.run {} --out FILE --workers 12"
SIZES = "python -m benchmarks.quality.compression --out FILE --checkpoint 0 2"
Body = Callable[[list[Row], list[Record], Path], str]


@dataclass(frozen=True)
class Section:
    """One study on the page.

    Attributes:
        study: name in the records.
        title: heading.
        body: rows, all records and the folder of pictures → tables and pictures.
        tests: it reads test rows.
        name: what `run` knows it by, if that is another name.
        also: another study that it shows.
        command: what runs it, if that is not `run`.
    """

    study: str
    title: str
    body: Body
    tests: bool = True
    name: str = ""
    also: str = ""
    command: str = ""


def picture(file: Path, what: str) -> str:
    return f"![{what}](images/{file.name})"


def _retention(rows: list[Row], records: list[Record], images: Path) -> str:
    fields = varied(rows)
    pictures.dots(tables.in_order(rows), lambda row: tables.label(row, fields), file := images / "evidence-retention.svg")
    return f"{picture(file, 'Test results of the ways to fine-tune')}\n\n{tables.retention(rows)}"


def _ranks(rows: list[Row], records: list[Record], images: Path) -> str:
    rank, targets = "lora.rank", "lora.target_modules"
    pictures.lines(rows, rank, targets, file := images / "evidence-rank.svg")
    return f"{picture(file, 'Results over the rank, for sets of layers')}\n\n{tables.grid(rows, rank, targets)}"


def _rates(rows: list[Row], records: list[Record], images: Path) -> str:
    pictures.rates(rows, file := images / "evidence-rates.svg")
    return f"{picture(file, 'Validation loss over the learning rate')}\n\n{tables.rates(rows)}"


def _advised(rows: list[Row], records: list[Record], images: Path) -> str:
    return tables.advised(rows)


def _alpha(rows: list[Row], records: list[Record], images: Path) -> str:
    fixed = rows_of(records, "alpha-fixed")
    both = [replace(row, method=way) for way, some in (("its own rate", rows), ("one rate for all", fixed)) for row in some]
    pictures.lines(both, "lora.alpha", "method", file := images / "evidence-alpha.svg", metric="loss", split="val")
    own, one = tables.of_study(rows), tables.of_study(fixed)
    return f"{picture(file, 'Validation loss over alpha')}\n\nEach α at its own rate:\n\n{own}\n\nAll at one rate:\n\n{one}"


def _dropout(rows: list[Row], records: list[Record], images: Path) -> str:
    return tables.of_study([replace(row, config={"rows": 1600, "lora.dropout": 0.0, **row.config}) for row in rows])


def _batch(rows: list[Row], records: list[Record], images: Path) -> str:
    pictures.lines(rows, "batch_size", "method", file := images / "evidence-batch.svg", metric="loss")
    return f"{picture(file, 'Loss over the batch size')}\n\n{tables.of_study(rows)}"


def _compression(rows: list[Row], records: list[Record], images: Path) -> str:
    return tables.compression([record for record in records if record["study"] == "compression"])


def _family(rows: list[Row], records: list[Record], images: Path) -> str:
    groups = {member.name: member.group for member in MEMBERS}
    file = images / "evidence-family.svg"
    pictures.dots(rows, lambda row: row.config["member"], file, groups=lambda row: groups[row.config["member"]])
    return f"{picture(file, 'Test results of the family')}\n\n{tables.family(rows)}"


def _forgetting(rows: list[Row], records: list[Record], images: Path) -> str:
    before = next((row.records[0]["measures"]["perplexity"] for row in rows if row.records[0]["steps"] == 0), None)
    if before is None:
        raise ValueError("forgetting: the model before training is in no record; `python -m benchmarks.quality.forgetting` measures it")
    parts = []
    if trained := [row for row in rows if row.records[0]["steps"]]:
        pictures.trade(trained, before, file := images / "evidence-forgetting.svg")
        parts += [picture(file, "Perplexity on other text over validation accuracy"), tables.forgetting(trained, before)]
    else:
        parts.append("**Not finished**: the rates beside the chosen ones were not run.")
    if measured := [row for row in rows_of(records, "retention") if row.split == "test" and row.chosen[0]["measures"]]:
        parts += ["The trials of the first section, at the rates chosen there:", tables.after_training(measured, before)]
    return "\n\n".join(parts)


SECTIONS = (
    Section("retention", "LoRA against other ways to fine-tune", _retention),
    Section("ablation", "Rank and layers", _ranks),
    Section("rates", "Learning rates", _rates, tests=False, name="sweeps"),
    Section("advised", "The advised learning rate", _advised, name="sweeps"),
    Section("alpha", "Alpha", _alpha, name="sweeps", also="alpha-fixed"),
    Section("dropout", "Dropout", _dropout, name="sweeps"),
    Section("batch", "Batch size", _batch, name="sweeps"),
    Section("compression", "Compression of a 7B model", _compression, tests=False, command=SIZES),
    Section("family", "The family", _family),
    Section("forgetting", "Forgetting", _forgetting, tests=False),
)


def provenance(records: Sequence[Record]) -> str:
    """Return where a study's numbers come from: the number of trials, those that failed, devices, versions and commits."""
    devices = Counter(record["device"] for record in records)
    versions = Counter(", ".join(f"{name} {number}" for name, number in record["versions"].items()) for record in records)
    commits = ", ".join(dict.fromkeys(record["commit"] for record in records))
    failed = sum(bool(record.get("error")) for record in records)
    return "; ".join(
        [
            f"{len(records)} trial{'s' * (len(records) > 1)}",
            *([f"{failed} failed"] * (failed > 0)),
            *devices,
            *versions,
            f"commit {commits}",
        ]
    )


def missing(rows: Sequence[Row]) -> str:
    """Return what was not run of a study that reads test rows."""
    untested = [row for row in rows if row.split == "val"]
    if len(untested) == len(rows):
        return "**Not finished**: only the trials that choose learning rates were run, so these are validation rows and one seed."
    if untested:
        names = ", ".join(f"{tables.WORDS.get(row.method, row.method)} on {row.task} ({row.base})" for row in untested)
        return f"**Not finished**: left out, because they have a learning rate but no test results: {names}."
    return ""


def by_heading(file: Path) -> dict[str, str]:
    """Return heading → text of a file."""
    parts = file.read_text(encoding="utf-8").split("\n## ")[1:] if file.is_file() else []
    return {head.strip(): text.strip() for head, _, text in (part.partition("\n") for part in parts)}


def page(records: Sequence[Record], images: Path, said: dict[str, str]) -> str:
    """Return the page, and draw its pictures."""
    parts, published = ["# Evidence", said.get("evidence", "")], by_heading(PUBLISHED)
    for section in SECTIONS:
        of_study = [record for record in records if record["study"] in (section.study, section.also)]
        rows = rows_of(records, section.study) if section.study != "compression" else []
        command = section.command or RUN.format(section.name or section.study)
        parts += [f"## {section.title}", said.get(section.study, "")]
        if rows or (of_study and section.study == "compression"):
            shown = [row for row in rows if row.split == "test" or not section.tests] or rows
            parts += [missing(rows) if section.tests else "", section.body(shown, list(records), images)]
            parts.append(f"`{command}`: {provenance(of_study)}.")
        else:
            parts.append(f"Not run here. `{command}` runs it.")
        parts.append(published.get(section.study, ""))
    return "\n\n".join(part for part in parts if part) + "\n"


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path, help="JSON-lines files")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the page (%(default)s)")
    parser.add_argument("--findings", type=Path, default=FINDINGS, help="text of the sections")
    options = parser.parse_args(argv)
    file = options.out / "evidence.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(read_records(options.records), options.out / "images", by_heading(options.findings)), encoding="utf-8")
    print(file)
    return file


if __name__ == "__main__":
    main()
