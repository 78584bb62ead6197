"""The tasks that are compared on: real rows out of packages, split once into train, validation and test.

- ``questions``: the type of answer that a question asks for, six classes (TREC; `examples/question_types.py`).
- ``reviews``: sentences from film reviews, praise or blame (`benchmarks/review_snippets.py`).
- ``translation``: messages of two web applications with their French translations, out of their compiled catalogs; scored by BLEU.

Rows are written in two forms: ``chat`` for a model that writes the answer, ``label`` for one that has a head for the labels.
"""

from __future__ import annotations

import gettext
import io
import json
import random
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.quality.packages import fetched
from benchmarks.review_snippets import SYSTEM as REVIEW_SYSTEM
from benchmarks.review_snippets import read_snippets
from examples.question_types import SYSTEM as QUESTION_SYSTEM
from examples.question_types import WORDS, cache_folder, fetch, read_questions

Form = Literal["chat", "label"]
Pairs = list[tuple[str, str]]
CATALOGS = ("wagtail==8.0.1", "weblate==5.14.3")
WORDS_IN_MESSAGE = (3, 20)  # shorter ones are names, longer ones whole paragraphs


@dataclass(frozen=True)
class Task:
    """Rows on disk.

    Attributes:
        name: Its name in records.
        kind: "classification" has labels and an accuracy; "generation" has texts, scored by BLEU and chrF.
        folder: ``{form}/{split}.jsonl`` lie in it.
        labels: The labels, in a fixed order.
        max_new_tokens: Longest answer that is generated.
    """

    name: str
    kind: Literal["classification", "generation"]
    folder: Path
    labels: tuple[str, ...] = ()
    max_new_tokens: int = 8

    def file(self, form: Form, split: str) -> str:
        """Return the file of a split."""
        return str(self.folder / form / f"{split}.jsonl")


@dataclass(frozen=True)
class Source:
    """Where a task's rows come from: a function that reads all pairs (text, answer), the system prompt, and the sizes of the splits."""

    read: Callable[[], Pairs]
    system: str
    sizes: dict[str, int]
    labels: tuple[str, ...] = ()
    max_new_tokens: int = 8


def read_translations(archives: Sequence[Path], language: str = "fr") -> Pairs:
    """Return the distinct messages of wheels' compiled catalogs, each with its translation, sorted by message."""
    pairs: dict[str, str] = {}
    for archive in archives:
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(wheel.namelist()):
                if f"/{language}/LC_MESSAGES/" in name and name.endswith(".mo"):
                    catalog = gettext.GNUTranslations(io.BytesIO(wheel.read(name)))._catalog  # type: ignore[attr-defined]
                    pairs |= {key.split("\x04")[-1]: value for key, value in catalog.items() if isinstance(key, str) and value != key}
    fewest, most = WORDS_IN_MESSAGE
    kept = {key: value for key, value in pairs.items() if fewest <= len(key.split()) <= most and "\n" not in key + value}
    distinct = {key.lower().rstrip(". :"): (key, kept[key]) for key in sorted(kept)}
    return [distinct[key] for key in sorted(distinct)]


def _translations() -> Pairs:
    with fetched(CATALOGS[0]) as one, fetched(CATALOGS[1]) as other:
        return read_translations([one, other])


def _reviews() -> Pairs:
    with fetched("vadersentiment==3.3.2") as archive:
        return read_snippets(archive)


_CLASSES = tuple(WORDS.values())
SOURCES = {
    "questions": Source(
        lambda: read_questions(fetch(cache_folder())[1]),
        QUESTION_SYSTEM.format(choices=f"{', '.join(_CLASSES[:-1])} or {_CLASSES[-1]}"),
        {"train": 1600, "val": 400, "test": 500},
        _CLASSES,
    ),
    "reviews": Source(_reviews, REVIEW_SYSTEM, {"train": 1600, "val": 400, "test": 1000}, ("positive", "negative")),
    "translation": Source(_translations, "Translate the message into French.", {"train": 2000, "val": 200, "test": 300}, (), 64),
}


def load_task(name: str, cache: Path | None = None) -> Task:
    """Return a task. Its packages are fetched and its splits written at the first call."""
    source, folder = SOURCES[name], (cache or quality_cache()) / name
    if not (folder / "label" / "test.jsonl").is_file():
        write_splits(source, folder)
    kind: Literal["classification", "generation"] = "classification" if source.labels else "generation"
    return Task(name, kind, folder, source.labels, source.max_new_tokens)


def quality_cache() -> Path:
    """Return the folder of models and rows, beside the quickstart's."""
    return cache_folder().parent / "quality"


def write_splits(source: Source, folder: Path) -> None:
    """Shuffle the pairs, and write disjoint splits in both forms."""
    pairs = source.read()
    random.Random(0).shuffle(pairs)
    if len(pairs) < sum(source.sizes.values()):
        raise ValueError(f"{len(pairs)} rows are fewer than sizes={source.sizes} need")
    start = 0
    for split, size in source.sizes.items():
        chosen = pairs[start : start + size]
        start += size
        _write(folder / "chat" / f"{split}.jsonl", [_chat(source, text, answer) for text, answer in chosen])
        _write(folder / "label" / f"{split}.jsonl", [{"text": text, "label": answer} for text, answer in chosen])


def _chat(source: Source, text: str, answer: str) -> dict:
    turns = {"system": source.system, "user": text, "assistant": answer}
    row: dict = {"messages": [{"role": role, "content": content} for role, content in turns.items()]}
    return row | ({"choices": list(source.labels)} if source.labels else {})


def _write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
