from __future__ import annotations

from pathlib import Path

import pytest

from lightning_lora import save_adapter
from tests.faults.kit import adapted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of `net()`, as `save_adapter` writes it."""
    return save_adapter(adapted(), tmp_path / "adapter")
