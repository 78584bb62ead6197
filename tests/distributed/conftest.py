from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    workers = Pool(2)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def pool4() -> Iterator[Pool]:
    workers = Pool(4)
    yield workers
    workers.close()
