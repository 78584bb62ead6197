"""A run on several processes that resumes inside an epoch: every row comes once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.test_resuming import fit, rows, write_rows
from tests.faults.kit import row


@row(41)
@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:You passed in a `val_dataloader`")
def test_it_goes_on_with_the_next_rows(pool: Any, pool4: Any, tmp_path: Path) -> None:
    """On as many processes batch by batch; on twice as many, and back, with the rest of the same rows."""
    file = write_rows(tmp_path, 48)
    first, second = pool.run(fit, file, str(tmp_path / "whole"))
    assert len(first) == 12 and rows(first[:6] + second[:6]) == rows(first[6:] + second[6:])
    again = pool.run(fit, file, str(tmp_path / "again"), str(tmp_path / "whole/step=1.ckpt"))
    assert again == [first[1:], second[1:]]
    # Step 3 is in the middle of a batch of four processes, whose first rows come again.
    for step, begun, end in ((3, 2, 6), (6, 6, 12)):
        four = pool4.run(fit, file, str(tmp_path / f"four{step}"), str(tmp_path / f"whole/step={step}.ckpt"))
        rest = [batch for batches in four for batch in batches[: (end - begun) // 2]]
        assert rows(rest) == rows(first[begun:end] + second[begun:end]) and len(four[0]) == (12 - begun) // 2, step
    back = pool.run(fit, file, str(tmp_path / "back"), str(tmp_path / "four3/step=4.ckpt"))
    assert back == [first[4:], second[4:]]


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:You passed in a `val_dataloader`")
def test_packed_rows_too(pool: Any, pool4: Any, tmp_path: Path) -> None:
    """Both processes pack alike and share the rows; four go on with the rest of them."""
    file, options = write_rows(tmp_path, 48), (2, True, 60)
    first, second = pool.run(fit_packed, file, str(tmp_path / "whole"), None, *options)
    steps = len(first) // 2
    assert steps > 3 and rows(first[:steps] + second[:steps]) == rows(first[steps:] + second[steps:]) == list(range(8, 56))
    assert pool.run(fit_packed, file, str(tmp_path / "again"), str(tmp_path / "whole/step=1.ckpt"), *options) == [first[1:], second[1:]]
    four = pool4.run(fit_packed, file, str(tmp_path / "four"), str(tmp_path / "whole/step=2.ckpt"), *options)
    rest = [batch for batches in four for batch in batches[: -(-(steps - 2) // 2)]]
    assert set(rows(first[2:steps] + second[2:steps])) <= set(rows(rest))


def fit_packed(file: str, folder: str, ckpt: str | None, size: int, packing: bool, length: int) -> list[list[int]]:
    return fit(file, folder, ckpt, size, packing=packing, max_length=length)
