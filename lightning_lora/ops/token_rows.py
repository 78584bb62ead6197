"""Replace some rows of a weight in what it computes, at the cost of those rows: the weight is neither copied nor written to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.utils.autocast import no_autocast


def replace_embedded(
    y: Tensor, ids: Tensor, rows: Tensor, index: Tensor, order: Tensor, padding: int | None = None, scale: Tensor | float = 1.0
) -> Tensor:
    """Return what an embedding gives with n rows of its weight replaced.

    Args:
        y: (..., d), what it gives without that.
        ids: (...), its input.
        rows: (n, d), the new rows.
        index: (n,), their numbers in the weight, ascending.
        order: (n,), which of ``rows`` is the k-th in ``index``.
        padding: which of ``rows`` gets no gradient here, as the base's ``padding_idx``.
        scale: what the embedding multiplies its output by, as Gemma's do.
    """
    ids = ids.to(index.dtype).contiguous()
    place = torch.searchsorted(index, ids).clamp_max(len(index) - 1)  # a search needs no table as long as the vocabulary
    new = F.embedding(order[place], rows, padding_idx=padding).to(y.dtype)  # cast last, so that gradients add up in the rows' dtype
    if isinstance(scale, Tensor) or scale != 1.0:
        new = new * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)
    return torch.where((index[place] == ids).unsqueeze(-1), new, y)


def replace_projected(y: Tensor, x: Tensor, rows: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what a linear gives with n rows of its weight replaced.

    Args:
        y: (..., out), what it gives without that.
        x: (..., in), its input.
        rows: (n, in), the new rows.
        index: (n,), their numbers in the weight, in the same order.
        bias: the linear's, (out,).
    """
    x, rows = x.to(y.dtype), rows.to(y.dtype)  # under autocast y has its dtype
    with no_autocast(y):
        new = F.linear(x, rows, None if bias is None else bias[index].to(y.dtype))
    return y.index_copy(-1, index, new)
