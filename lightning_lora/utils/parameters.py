"""Make parameters that autograd can use, whatever mode the caller is in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def make_parameter(value: Tensor, requires_grad: bool) -> nn.Parameter:
    """Return a parameter over this tensor, or over a copy of a tensor that was made in inference mode.

    A parameter that is made in inference mode cannot be saved for a backward pass, not even after the mode has ended.
    """
    with torch.inference_mode(False):
        return nn.Parameter(value.clone() if value.is_inference() else value, requires_grad=requires_grad)
