"""What autocast makes of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts x to for a matrix product; None where it is off, or leaves x alone (float64, integers, meta)."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not x.is_floating_point() or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
