"""‖W + s·B·A‖² of every row, a weight with its update, without the dense product.

With one row of W and B at a time it is ‖W‖² + 2s·(W·Aᵀ)·B + s²·(B·A·Aᵀ)·B, which torch takes some ten operations to say. Where Triton
kernels run, one of them adds up the squares themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lora.ops import backends
from lightning_lora.utils.custom_op import dispatch, register_custom_op
from lightning_lora.utils.sharding import is_sharded
from lightning_lora.utils.torch_private import transforms_active


def squared_norms(W: Tensor, A: Tensor, B: Tensor, scale: float, own: Callable[[], Tensor]) -> Tensor:
    """``‖W + scale·B·A‖²`` of every row, in B's dtype. For use without gradients and without autocast.

    Args:
        W: (out, in), or one each a group, (groups, out, in).
        A: (r, in), or one each a group.
        B: (out, r), or one each a group.
        scale: α/r.
        own: gives ``‖W‖²`` of every row, where it is asked for.

    Returns:
        (out,) over all groups.
    """
    if _served(W):
        return dispatch(_squares, W, A, B, scale)[0].sum(0, dtype=B.dtype)
    cross = (A.to(W.dtype) @ W.mT).mT.to(B.dtype) * (2 * scale)  # (…, out, r); this way round is the faster one
    return (torch.add(cross, B @ (A @ A.mT), alpha=scale * scale) * B).sum(-1).flatten() + own()


def _served(W: Tensor) -> bool:
    plain = torch.compiler.is_compiling() or not transforms_active()
    return plain and W.ndim == 2 and not is_sharded(W) and W.stride(1) == 1 and backends.run(W)


def _squares(W: Tensor, A: Tensor, B: Tensor, scale: float) -> list[Tensor]:
    from lightning_lora.ops import triton_weight_norm

    return [triton_weight_norm.squares(W, A, B, scale)]


def _squares_shapes(W: Tensor, A: Tensor, B: Tensor, scale: float) -> list[Tensor]:
    from lightning_lora.ops import triton_weight_norm

    return [W.new_empty(triton_weight_norm.parts(W.shape[1]), W.shape[0], dtype=torch.float32)]


register_custom_op("squared_norms(Tensor W, Tensor A, Tensor B, float scale) -> Tensor[]", _squares, _squares_shapes)
