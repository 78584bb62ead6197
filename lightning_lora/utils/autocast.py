"""What autocast makes of a tensor, and its absence."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts x to for a matrix product; None where it is off, or leaves x alone (float64, integers, meta)."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not x.is_floating_point() or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast on x's device, which on the meta device there is none of."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
