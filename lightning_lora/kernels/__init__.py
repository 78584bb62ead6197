"""The rank-r work of a LoRA step as few passes over the big tensors, in two versions behind the same functions.

``plain`` is torch operations, for every device and dtype. ``low_rank`` and ``gated`` are Triton kernels for NVIDIA GPUs; nothing
imports them unless :func:`usable` says so. Each is tested against float64.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

# Smaller inputs are bound by launching, not by computing, and a kernel takes longer to launch than it saves.
FEW_ROWS = 1024
# A compiler launches its own kernels faster: 1B of 4 x 512 tokens took 50 ms with the plain definition compiled, 69 with such operations.
FEW_ENTRIES_COMPILED = 12 * 2**20
WIDEST_GATED = 64  # the largest rank whose sums fit in the registers of the gated MLP's kernel


_RUNS: dict[int, bool] = {}  # CUDA device → whether it runs the kernels


def look_at(device: torch.device) -> None:
    """Note whether a device runs Triton kernels. Layers call it when they come to a device, for a compiler cannot ask later.

    ``LIGHTNING_LORA_KERNELS=plain`` in the environment says that none does.
    """
    if device.type == "cuda" and device.index not in _RUNS:
        wanted = os.environ.get("LIGHTNING_LORA_KERNELS") != "plain" and torch.version.hip is None
        _RUNS[device.index] = (
            wanted and importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)
        )


def usable(x: Tensor) -> bool:
    """Whether the Triton kernels serve for tensors like x (..., features): half precision, enough rows, a GPU from Ampere on.

    Under autocast, x may still be in the dtype that it will be cast from.
    """
    few = FEW_ENTRIES_COMPILED if torch.compiler.is_compiling() else FEW_ROWS * x.shape[-1]
    if not x.is_cuda or x.numel() < few:
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    return _RUNS.get(x.device.index, False)
