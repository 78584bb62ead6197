"""What the tests of files share."""

import pytest

from lightning_lora import save_adapter
from tests.conftest import ALL, TinyModel, adapted


@pytest.fixture
def folder(make, tmp_path):
    return save_adapter(adapted(make(TinyModel), **ALL), tmp_path / "adapter")
