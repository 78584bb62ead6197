"""Make parameters that autograd can use, whatever mode the caller is in; find tensors that are computed from others."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


def make_parameter(value: Tensor, requires_grad: bool) -> nn.Parameter:
    """Return a parameter over this tensor, or over a copy of a tensor that was made in inference mode.

    A parameter that is made in inference mode cannot be saved for a backward pass, not even after the mode has ended.
    """
    with torch.inference_mode(False):
        return nn.Parameter(value.clone() if value.is_inference() else value, requires_grad=requires_grad)


def is_computed(module: nn.Module, name: str) -> bool:
    """Return whether a module computes a tensor anew before each call, so that what is written to the tensor is lost.

    Pruning and spectral_norm keep the parameter as ``name_orig``, weight_norm as ``name_g`` and ``name_v``.
    """
    kept = {f"{name}_orig", f"{name}_v"} & module._parameters.keys()
    return is_parametrized(module, name) or (bool(kept) and name not in module._parameters)
