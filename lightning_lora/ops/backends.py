"""The rank-r work of a LoRA step as few passes over the big tensors; what a layer calls is there in two versions.

``plain`` is torch operations, for every device and dtype. ``low_rank``, ``gated`` and ``norms`` are Triton kernels for NVIDIA GPUs;
nothing imports them unless :func:`usable` or :func:`run` says so. Each is tested against float64.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_lora.utils.autocast import autocast_dtype

logger = logging.getLogger(__name__)

# Smaller inputs are bound by launching, not by computing, and a kernel takes longer to launch than it saves.
FEW_ROWS = 1024
# A compiler launches its own kernels faster: 1B of 4 x 512 tokens took 50 ms with the plain definition compiled, 69 with such operations.
FEW_ENTRIES_COMPILED = 12 * 2**20
WIDEST_GATED = 64  # the largest rank whose sums fit in the registers of the gated MLP's kernel


_RUNS: dict[int, bool] = {}  # CUDA device → whether it runs the kernels


_recording = False  # a global, and no context variable, since a compiler guards what it traces by those only


@contextmanager
def recording() -> Iterator[None]:
    """While a block runs that is recorded as CUDA graphs (:mod:`lightning_lora.model.compile`): these launch every kernel alike, so small
    inputs are no exception."""
    global _recording
    outer, _recording = _recording, True
    try:
        yield
    finally:
        _recording = outer


def look_at(device: torch.device) -> None:
    """Note whether a device runs Triton kernels, and say once if it does not.

    Layers call it when they come to a device, for a compiler cannot ask later. ``LIGHTNING_LORA_KERNELS=plain`` in the environment
    switches the kernels off.
    """
    if device.type != "cuda" or device.index in _RUNS:
        return
    capability, reason = torch.cuda.get_device_capability(device), None
    if os.environ.get("LIGHTNING_LORA_KERNELS") == "plain":
        reason = "LIGHTNING_LORA_KERNELS=plain"
    elif torch.version.hip is not None:
        reason = "they are for NVIDIA GPUs"
    elif importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    elif capability < (8, 0):
        reason = f"its compute capability is {capability[0]}.{capability[1]}, under 8.0"
    _RUNS[device.index] = reason is None
    if reason is not None:
        logger.warning("%s goes without the Triton kernels: %s.", device, reason)


def usable(x: Tensor) -> bool:
    """Whether the Triton kernels serve for tensors like x (..., features): where they run, with enough rows.

    Under autocast, x may still be in the dtype that it will be cast from.
    """
    if not x.is_cuda:
        return False
    few = FEW_ENTRIES_COMPILED if torch.compiler.is_compiling() and not _recording else FEW_ROWS * x.shape[-1]
    return x.numel() >= few and run(x)


def run(x: Tensor) -> bool:
    """Whether the Triton kernels run on x, however small: half precision, a GPU from Ampere on."""
    return x.is_cuda and (autocast_dtype(x) or x.dtype) in (torch.bfloat16, torch.float16) and _RUNS.get(x.device.index, False)
