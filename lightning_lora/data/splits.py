"""Take a share of the training rows for validation."""

from __future__ import annotations

from typing import Any, Literal

import torch

from lightning_lora.data.reading import PlacedRow


def share_of(val: Any) -> float | None:
    """Return ``data.val`` if it is a number; None if it names a source.

    Raises:
        ValueError: It is a number that is no share.
    """
    try:
        share = float(val)
    except (TypeError, ValueError):
        return None
    if not 0 < share < 1:
        raise ValueError(f"data.val={val!r} must be a share of the training rows between 0 and 1, or name a file")
    return share


def take_share(rows: list[PlacedRow], share: float, seed: int, split: Literal["train", "val"] | str) -> list[PlacedRow]:
    """Return one part of the rows, in their order: "val" is the share, at least one row, and "train" the rest.

    Raises:
        ValueError: No row would be left to train on.
    """
    taken = max(1, round(share * len(rows)))
    if taken == len(rows):
        raise ValueError(f"data.val={share} of {len(rows)} training rows leaves none to train on; add rows, or leave data.val out")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in sorted(order[:taken] if split == "val" else order[taken:])]
