"""Ask which dtype autocast casts a tensor to, and switch autocast off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast casts x to for a matrix product.

    None where autocast is off or does not cast x (float64, integers, the meta device).
    """
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not x.is_floating_point() or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context that disables autocast on x's device. The meta device has no autocast, so there it does nothing."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
