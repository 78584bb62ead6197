"""Sentences from film reviews, praise or blame, as rows for a causal language model: a second real task, beside the quickstart's questions.

They are the movie review snippets that were rated for VADER (Hutto and Gilbert, ICWSM 2014), about 10,600. The package's source archive has
them; it is only read, nothing in it runs here:

    pip download --no-deps --no-binary :all: vadersentiment==3.3.2
    python benchmarks/review_snippets.py vaderSentiment-3.3.2.tar.gz .cache/reviews

A snippet is positive or negative by the sign of its mean rating. Repeats and ratings of zero are dropped before splitting.
"""

from __future__ import annotations

import json
import random
import sys
import tarfile
from pathlib import Path

OUTER, INNER = "additional_resources/hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"
SPLITS = {"train": 1600, "val": 400, "test": 1000}
SYSTEM = "Say whether the sentence about a film is positive or negative."


def read_snippets(sdist: Path) -> list[tuple[str, str]]:
    """The distinct snippets, each with "positive" or "negative", in the file's order."""
    with tarfile.open(sdist) as outer:
        (name,) = [name for name in outer.getnames() if name.endswith(OUTER)]
        with outer.extractfile(name) as nested, tarfile.open(fileobj=nested) as inner:  # type: ignore[union-attr]
            (name,) = [name for name in inner.getnames() if name.endswith(INNER)]
            text = inner.extractfile(name).read().decode("latin-1")  # type: ignore[union-attr]
    rows = {}
    for line in text.splitlines():
        _, rating, snippet = line.split("\t")
        if float(rating):
            rows.setdefault(snippet.strip().lower(), (snippet.strip(), "positive" if float(rating) > 0 else "negative"))
    return list(rows.values())


def write_splits(snippets: list[tuple[str, str]], folder: Path, sizes: dict[str, int] = SPLITS) -> None:
    """Shuffle, and write disjoint ``train``, ``val`` and ``test`` files."""
    folder.mkdir(parents=True, exist_ok=True)
    random.Random(0).shuffle(snippets)
    start = 0
    for split, size in sizes.items():
        rows = snippets[start : start + size]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row(*pair)) + "\n" for pair in rows))
        start += size


def row(snippet: str, answer: str) -> dict:
    turns = {"system": SYSTEM, "user": snippet, "assistant": answer}
    return {"messages": [{"role": role, "content": text} for role, text in turns.items()], "choices": ["positive", "negative"]}


if __name__ == "__main__":
    write_splits(read_snippets(Path(sys.argv[1])), Path(sys.argv[2]))
