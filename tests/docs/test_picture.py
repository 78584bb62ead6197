"""README's picture has the numbers of the tables that it is drawn from, and README's own table has no others."""

from __future__ import annotations

import re

import picture
import pytest

from tests.docs.pages import PAGES, ROOT, TEXT


def test_the_picture_is_of_the_tables() -> None:
    """`python benchmarks/picture.py` draws it anew."""
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture.PICTURE.read_text())
    for label, times, memory in picture.bars():
        assert label in texts
        assert {f"{value:.2f}" for value in times if value} | {f"{value:.1f}" for value in memory if value} <= set(texts)
    drawn = [text for text in texts if re.fullmatch(r"[\d.]+", text)]
    assert len(drawn) == sum(value is not None for _, times, memory in picture.bars() for value in (*times, *memory))
    assert picture.PICTURE.relative_to(ROOT).as_posix() in PAGES["README"]


@pytest.mark.parametrize("label", ["1B, nothing set: eager, autocast", "30B-A3B in 16 layers, all experts"])
def test_readmes_table_says_the_same(label: str) -> None:
    (times, memory) = next((times, memory) for name, times, memory in picture.bars() if name == label)
    ours, peft = (f"{time:.2f}, {gib:.1f} GiB" for time, gib in zip(times, memory, strict=True))
    assert f"| {ours} | {peft} |" in PAGES["README"]


def test_readmes_other_numbers_are_of_the_pages_and_benchmarks() -> None:
    elsewhere = TEXT.replace(PAGES["README"], "") + (ROOT / "benchmarks" / "README.md").read_text()
    rows = re.findall(r"^\| (?!\|)(.+?) \| (.*?) \| (.*?) \|", PAGES["README"].partition("## What it is better at")[2], re.MULTILINE)
    numbers = {number for row in rows for number in re.findall(r"\d[\d,.]*\d|\d+", " ".join(row))}
    assert len(numbers) > 20
    assert not {number for number in numbers if not re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d])", elsewhere)}


def test_readme_is_short() -> None:
    assert len(PAGES["README"].splitlines()) < 120
