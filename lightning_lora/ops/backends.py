"""Choose between the two versions of the rank-r products that a layer calls.

``plain`` uses torch operations, for every device and dtype. ``triton_low_rank``, ``triton_gated_mlp`` and ``triton_weight_norm`` are
Triton kernels for NVIDIA GPUs, with few passes over the big tensors. They are imported only where a GPU :func:`has_kernels`. Each version
is tested against float64.
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
from lightning_lora.utils.custom_op import shapes_only

logger = logging.getLogger(__name__)

# Below this, launches take longer than the computation, and a kernel takes longer to launch than it saves.
FEW_ROWS = 1024
# Below this, the compiler's own kernels are faster: a step of 1B with 4 x 512 tokens took 50 ms with the compiled definition,
# 69 ms with custom operators.
FEW_ENTRIES_COMPILED = 12 * 2**20


_RUNS: dict[int, bool] = {}  # CUDA device → whether it runs the kernels
_FLOAT8: set[int] = set()  # CUDA devices that run the kernels and have FP8 tensor cores


_planned = 0  # entries from which tensors on the meta device count as a GPU's, 0: never
_recording = False  # a global, not a context variable: a compiler guards its graphs by globals only


@contextmanager
def recording() -> Iterator[None]:
    """While active, let small inputs use the kernels too. For blocks recorded as CUDA graphs (:mod:`lightning_lora.model.compile`).

    A CUDA graph launches every kernel equally fast, so small inputs are no exception there.
    """
    global _recording
    outer, _recording = _recording, True
    try:
        yield
    finally:
        _recording = outer


@contextmanager
def planned(compiled: bool = False) -> Iterator[None]:
    """While active, let tensors on the meta device take the ways that a GPU with the kernels takes. For estimates of memory.

    Args:
        compiled: as compiled blocks take them.
    """
    global _planned
    outer, _planned = _planned, FEW_ENTRIES_COMPILED if compiled and not _recording else 1
    try:
        with shapes_only():
            yield
    finally:
        _planned = outer


def look_at(device: torch.device) -> None:
    """Record whether a device runs Triton kernels. Log once why it does not.

    Layers call it when they are moved to a device, because a compiler cannot ask later. ``LIGHTNING_LORA_KERNELS=plain`` in the
    environment switches the kernels off.
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
    if reason is None and capability >= (8, 9):
        _FLOAT8.add(device.index)
    if reason is not None:
        logger.warning("%s goes without the Triton kernels: %s.", device, reason)


def worth_kernels(x: Tensor) -> bool:
    """True if the Triton kernels apply to tensors like x (..., features): they run on its device, and it has enough rows.

    Under autocast, x may still have the dtype that it will be cast from.
    """
    if not x.is_cuda:
        return bool(_planned and x.is_meta and x.numel() >= max(_planned, FEW_ROWS * x.shape[-1]) and has_kernels(x))
    few = FEW_ENTRIES_COMPILED if torch.compiler.is_compiling() and not _recording else FEW_ROWS * x.shape[-1]
    return x.numel() >= few and has_kernels(x)


def has_kernels(x: Tensor) -> bool:
    """True if the Triton kernels run on x, however small it is: in half precision, on a GPU of the Ampere generation or later."""
    runs = _RUNS.get(x.device.index, False) if x.is_cuda else bool(_planned and x.is_meta)
    return runs and (autocast_dtype(x) or x.dtype) in (torch.bfloat16, torch.float16)


def runs_kernels(device: torch.device) -> bool:
    """True if a device runs Triton kernels."""
    return device.type == "cuda" and _RUNS.get(device.index, False)


def multiplies_float8(x: Tensor) -> bool:
    """True if products with x are computed in FP8: bf16, on a GPU with FP8 tensor cores (compute capability 8.9 or higher)."""
    return x.is_cuda and x.dtype == torch.bfloat16 and x.device.index in _FLOAT8
