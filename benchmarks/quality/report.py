"""Write the page of evidence: tables and pictures from the records, findings from ``findings.md``, what others published.

    python -m benchmarks.quality.report benchmarks/records/quality/*.jsonl --out docs

writes ``docs/evidence.md`` and ``docs/images/evidence-*.svg``. It computes means and spreads; it judges nothing. The sentences that do are
written by hand in ``findings.md``, one heading a study, and stand before its table; ``published.md`` has what stands after it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.quality import pictures, tables
from benchmarks.quality.records import Record, Row, read_records, rows_of, varied

FINDINGS, PUBLISHED = (Path(__file__).with_name(name) for name in ("findings.md", "published.md"))


@dataclass(frozen=True)
class Section:
    """One study on the page.

    Attributes:
        study: name in the records.
        title: heading.
        body: rows, all records and the folder of pictures → tables and pictures.
        name: what `run` knows it by, if that is another name.
        also: another study that it shows.
        command: what runs it, if that is not `run`.
    """

    study: str
    title: str
    body: Callable[[list[Row], list[Record], Path], str]
    name: str = ""
    also: str = ""
    command: str = ""


def picture(name: str, what: str) -> str:
    return f"![{what}](images/{name})"


def _retention(rows: list[Row], records: list[Record], images: Path) -> str:
    fields = varied([row for row in rows if row.method == "lora"])
    file = images / "evidence-retention.svg"
    pictures.dots(rows, lambda row: tables.label(row, fields if row.method == "lora" else ()), file)
    return f"{picture(file.name, 'Test results of the ways to fine-tune')}\n\n{tables.retention(rows)}"


def _ranks(rows: list[Row], records: list[Record], images: Path) -> str:
    file, rank, targets = images / "evidence-rank.svg", "lora.rank", "lora.target_modules"
    pictures.lines(rows, rank, targets, file)
    return f"{picture(file.name, 'Test results over the rank, for sets of layers')}\n\n{tables.grid(rows, rank, targets)}"


def _rates(rows: list[Row], records: list[Record], images: Path) -> str:
    pictures.rates(rows, file := images / "evidence-rates.svg")
    return f"{picture(file.name, 'Validation loss over the learning rate')}\n\n{tables.rates(rows)}"


def _advised(rows: list[Row], records: list[Record], images: Path) -> str:
    return tables.advised(rows)


def _alpha(rows: list[Row], records: list[Record], images: Path) -> str:
    fixed, file = rows_of(records, "alpha-fixed"), images / "evidence-alpha.svg"
    both = [replace(row, method=way) for way, some in (("its own rate", rows), ("one rate for all", fixed)) for row in some]
    pictures.lines(both, "lora.alpha", "method", file, split="val")
    own, one = tables.of_study(rows), tables.validated(fixed)
    return f"{picture(file.name, 'Validation accuracy over alpha')}\n\nEach α at its own rate:\n\n{own}\n\nAll at one rate:\n\n{one}"


def _dropout(rows: list[Row], records: list[Record], images: Path) -> str:
    return tables.grid([replace(row, config={"lora.dropout": 0.0, "rows": "all", **row.config}) for row in rows], "lora.dropout", "rows")


def _batch(rows: list[Row], records: list[Record], images: Path) -> str:
    pictures.lines(rows, "batch_size", "method", file := images / "evidence-batch.svg")
    return f"{picture(file.name, 'Test results over the batch size')}\n\n{tables.of_study(rows)}"


def _compression(rows: list[Row], records: list[Record], images: Path) -> str:
    return tables.compression([record for record in records if record["study"] == "compression"])


def _family(rows: list[Row], records: list[Record], images: Path) -> str:
    from benchmarks.quality.family import MEMBERS

    groups, file = {member.name: member.group for member in MEMBERS}, images / "evidence-family.svg"
    pictures.dots(rows, lambda row: row.config["member"], file, groups=lambda row: groups[row.config["member"]])
    return f"{picture(file.name, 'Test results of the family')}\n\n{tables.family(rows)}"


def _forgetting(rows: list[Row], records: list[Record], images: Path) -> str:
    (before,) = [row.records[0] for row in rows if row.records[0]["steps"] == 0]
    rows, file = [row for row in rows if row.records[0]["steps"]], images / "evidence-forgetting.svg"
    pictures.trade(rows, before["measures"]["perplexity"], file)
    return f"{picture(file.name, 'Perplexity on other text over validation accuracy')}\n\n{tables.forgetting(rows, before)}"


SECTIONS = (
    Section("retention", "LoRA against other ways to fine-tune", _retention),
    Section("ablation", "Rank and layers", _ranks),
    Section("rates", "Learning rates", _rates, name="sweeps"),
    Section("advised", "The advised learning rate", _advised, name="sweeps"),
    Section("alpha", "Alpha", _alpha, name="sweeps", also="alpha-fixed"),
    Section("dropout", "Dropout", _dropout, name="sweeps"),
    Section("batch", "Batch size", _batch, name="sweeps"),
    Section(
        "compression",
        "Compression of a 7B model",
        _compression,
        command="python -m benchmarks.quality.compression --out FILE --checkpoint 0 2",
    ),
    Section("family", "The family", _family),
    Section("forgetting", "Forgetting", _forgetting),
)


def provenance(records: Sequence[Record]) -> str:
    """Return where a study's numbers come from: device, versions, commit, the number of trials and their seconds."""
    devices = Counter(record["device"] for record in records)
    versions = Counter(", ".join(f"{name} {number}" for name, number in record["versions"].items()) for record in records)
    commits = ", ".join(dict.fromkeys(record["commit"] for record in records))
    failed = [record for record in records if record.get("error")]
    parts = [f"{len(records)} trials", *devices, *versions, f"commit {commits}"]
    if failed:
        parts.insert(1, f"{len(failed)} failed")
    return "; ".join(parts)


def by_heading(file: Path) -> dict[str, str]:
    """Return heading → text of a file."""
    parts = file.read_text(encoding="utf-8").split("\n## ")[1:] if file.is_file() else []
    return {head.strip(): text.strip() for head, _, text in (part.partition("\n") for part in parts)}


def page(records: Sequence[Record], images: Path, said: dict[str, str]) -> str:
    """Return the page, and draw its pictures. A study without records is left out."""
    parts, published = ["# Evidence", said.get("evidence", "")], by_heading(PUBLISHED)
    for section in SECTIONS:
        of_study = [record for record in records if record["study"] in (section.study, section.also)]
        if of_study:
            rows = [] if section.study == "compression" else rows_of(records, section.study)
            command = section.command or f"python -m benchmarks.quality.run {section.name or section.study} --out FILE --workers 12"
            parts += [f"## {section.title}", said.get(section.study, ""), section.body(rows, list(records), images)]
            parts += [f"`{command}`: {provenance(of_study)}."]
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
