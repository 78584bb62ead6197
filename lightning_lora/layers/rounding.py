"""Measure what a merge lost when its sum was rounded to the weight's dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lora.utils.messages import counted


@dataclass(frozen=True)
class Rounding:
    """What rounding did to the update Δ of one weight, over all its entries.

    Attributes:
        missing: ‖merged − base − Δ‖², the square of what was lost.
        update: ‖Δ‖².
        unchanged: number of entries with the same value before and after the merge.
        entries: number of entries.
        dtype: the merged weight's, such as ``"bfloat16"``; of a quantized weight the dtype that it dequantizes to.
    """

    missing: float
    update: float
    unchanged: int
    entries: int
    dtype: str

    @property
    def lost(self) -> float:
        """Share of the update that rounding lost, ‖merged − base − Δ‖ / ‖Δ‖; 0 without an update.

        It exceeds 1 if the rounding error is larger than the update. It is infinite if a sum does not fit the dtype.
        """
        share = self.missing / self.update if self.update > 0 else 0.0
        return math.sqrt(share) if math.isfinite(share) else math.inf

    @property
    def survives(self) -> float:
        """Share of the update that the weight's dtype keeps: 1 − ``lost``, and 0 if more than the update is lost."""
        return max(0.0, 1.0 - self.lost)


def measure(base: Tensor, update: Tensor, merged: Tensor, groups: Sequence[Any] = ()) -> Rounding:
    """Measure one merge.

    Args:
        base: the weight before the merge, any shape, in the dtype of the sums (fp32 or wider).
        update: Δ, same shape.
        merged: the weight after the merge, same shape, any dtype.
        groups: process groups over which the weight is sharded. The result is that of the full weight; a collective.
    """
    wide = merged.to(base.dtype)
    unchanged = int((wide == base).sum())
    missing, size = float((wide - base).sub_(update).norm()), float(update.norm())
    sums = [missing**2 if math.isfinite(missing) else math.inf, size**2, unchanged, base.numel()]
    for group in groups:
        sums = _total(sums, group)
    return Rounding(sums[0], sums[1], int(sums[2]), int(sums[3]), str(merged.dtype).removeprefix("torch."))


def _total(numbers: list[float], group: Any) -> list[float]:
    """Return sums over a group's ranks. NCCL computes on GPUs only."""
    import torch.distributed as dist

    total = torch.tensor(numbers, dtype=torch.float64, device="cuda" if dist.get_backend(group) == "nccl" else "cpu")
    dist.all_reduce(total, group=group)
    return total.tolist()


def check_limit(max_lost: float | None, name: str = "max_lost") -> None:
    """Raise ValueError unless a limit is None or a number of at least 0."""
    if max_lost is not None and not (isinstance(max_lost, (int, float)) and not isinstance(max_lost, bool) and max_lost >= 0):
        raise ValueError(f"{name}={max_lost!r} must be a share of an update, a number from 0 on, or None.")


def check_lost(roundings: Mapping[str, Rounding | None], max_lost: float | None) -> None:
    """Compare the share that each merge lost with a limit.

    Args:
        roundings: name of a layer → what its merge lost, None if that is unknown.
        max_lost: the largest share allowed; None allows any.

    Raises:
        ValueError: a merge lost more, or nobody measured it. The message names the worst layer.
    """
    if max_lost is None:
        return
    unknown = [name for name, rounding in roundings.items() if rounding is None]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} was merged by other code, so its rounding is unknown and max_lost={max_lost:g} cannot be checked."
        )
    lost = {name: rounding.lost for name, rounding in roundings.items() if rounding is not None and rounding.lost > max_lost}
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        raise ValueError(
            f"{worst!r} loses {lost[worst]:.2%} of its update by rounding, more than max_lost={max_lost:g} ({len(lost)} of"
            f" {counted(len(roundings), 'weight', 'do')}): merge into a wider dtype (model.float() before the merge, or the base loaded in"
            " it), into a quantized base with 'dequantize', raise max_lost, or leave the adapter unmerged."
        )
