"""‖W + s·B·A‖² of every row of a weight with its update, without computing the dense product B·A.

For each row of W and B it expands to ‖W‖² + 2s·(W·Aᵀ)·B + s²·(B·A·Aᵀ)·B, which takes about ten torch operations. Where Triton kernels
run, one kernel sums the squares (W + s·B·A)² directly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.ops import backends
from lightning_lora.utils.custom_op import dispatch, register_custom_op
from lightning_lora.utils.sharding import is_sharded
from lightning_lora.utils.torch_private import transforms_active


def squared_norms(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return ``‖W + scale·B·A‖²`` of every row, in B's dtype. For use without gradients and without autocast.

    Args:
        W: (out, in), or one per group, (groups, out, in).
        A: (r, in), or one per group.
        B: (out, r), or one per group.
        scale: α/r.

    Returns:
        (out,) over all groups.
    """
    if _kernel_takes(W):
        return dispatch(_squares, W, A, B, scale)[0].sum(0, dtype=B.dtype)
    own = torch.linalg.vector_norm(W, dim=-1, dtype=B.dtype).square().flatten()
    cross = (A.to(W.dtype) @ W.mT).mT.to(B.dtype) * (2 * scale)  # (…, out, r); this order of the product is faster
    gram = A @ A.mT
    square = (torch.add(cross, B @ gram, alpha=scale * scale) * B).sum(-1).flatten() + own
    plain = type(square) is Tensor and square.device.type == "cpu" and not transforms_active()
    if not plain and not torch.compiler.is_compiling():
        return square
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-1)  # ‖A‖ of every row
    largest = (own.sqrt() + scale * (B.abs() @ lengths).flatten()).square()
    return dispatch(_exact, square, largest, W, A, B, scale)[0]


_CANCELS = 16.0  # how many times larger than their sum the expansion's terms may be


def _exact(square: Tensor, largest: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> list[Tensor]:
    """Compute again, densely, the rows in which the expansion's terms cancel: where the update takes most of W away, or is itself a small
    difference. The rounding error is that of ``largest``, (‖W‖ + Σ|s·B|·‖A‖)².

    Few rows in few trainings are there. On GPUs without a kernel this is left out, since looking would wait for the device.
    """
    if square.device.type != "cpu" or not (low := square < largest / _CANCELS).any():
        return [square]
    rows = low.view(W.shape[:-1])
    update = (B[rows] @ A if W.ndim == 2 else (B @ A)[rows]) * scale
    exact = square.clone()
    exact[low] = (W[rows].to(update.dtype) + update).square().sum(-1)
    return [exact]


def _exact_shapes(square: Tensor, largest: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> list[Tensor]:
    return [torch.empty_like(square)]


def _kernel_takes(W: Tensor) -> bool:
    plain = torch.compiler.is_compiling() or not transforms_active()
    return plain and W.ndim == 2 and not is_sharded(W) and W.stride(1) == 1 and backends.has_kernels(W)


def _squares(W: Tensor, A: Tensor, B: Tensor, scale: float) -> list[Tensor]:
    from lightning_lora.ops import triton_weight_norm

    return [triton_weight_norm.squares(W, A, B, scale)]


def _squares_shapes(W: Tensor, A: Tensor, B: Tensor, scale: float) -> list[Tensor]:
    from lightning_lora.ops import triton_weight_norm

    return [W.new_empty(triton_weight_norm.parts(W.shape[1]), W.shape[0], dtype=torch.float32)]


register_custom_op("squared_norms(Tensor W, Tensor A, Tensor B, float scale) -> Tensor[]", _squares, _squares_shapes)
register_custom_op(
    "exact_norms(Tensor square, Tensor largest, Tensor W, Tensor A, Tensor B, float scale) -> Tensor[]", _exact, _exact_shapes
)
