"""What tests of whole fits share: a tiny language model's folder, and a file of rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_lm.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def file(tmp_path: Path) -> str:
    return tiny_lm.write(tmp_path / "train.jsonl", tiny_lm.rows(10))
