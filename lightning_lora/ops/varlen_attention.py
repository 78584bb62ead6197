"""Causal attention over packed rows: a token attends to the tokens before it in its own document, and to no other document.

A row holds several documents, one behind the other. Where the documents begin is a tensor of fixed shape, so that one compiled graph
serves every batch. A mask of (T, T) per row would cost as much as one document of the row's full length.

``packed_mask`` and ``masked_attention`` are the definition. On NVIDIA GPUs, in half precision, torch's FlashAttention kernel for
documents of varying length computes the same. On a CPU each document is attended to by itself.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from lightning_lora.utils.autocast import autocast_dtype

_HALF = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256  # of FlashAttention's kernels
# torch 2.11 takes fewer heads of keys than of queries without being told.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return causal attention within each document of packed rows.

    Args:
        query: (B, H, T, D); under autocast in any floating dtype.
        key: (B, G, T, D); H is a multiple of G.
        value: (B, G, T, E).
        bounds: (N + 1,), int32, rising from 0 to B·T: where each document begins in the rows laid end to end. The last entries may repeat.
        longest: At least the longest document's length, in tokens.
        scale: Factor of the scores, 1/√D by default.
        window: Number of latest tokens that a token attends to, itself included; all by default.
        dropout: Share of the attention weights that is dropped.

    Returns:
        (B, H, T, E), in the dtype of the operands.
    """
    dtype = autocast_dtype(query)
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not dropout and _takes_flash(query, value):
        q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))  # (B·T, heads, D)
        back = -1 if window is None else window - 1
        found = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(back, 0), **_GROUPED)
        assert isinstance(found, Tensor)  # it is a pair if more is asked for
        return found.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)
    if query.device.type == "cpu" and not torch.compiler.is_compiling():  # each document's length is read, which breaks a graph
        return _document_by_document(query, key, value, bounds, scale, window, dropout)
    return masked_attention(query, key, value, packed_mask(bounds, len(query), query.shape[2], window), scale, dropout)


def packed_mask(bounds: Tensor, rows: int, length: int, window: int | None = None) -> Tensor:
    """Return which token (dimension 2) attends to which (dimension 3): (B, 1, T, T), bool. See `varlen_attention`."""
    place = torch.arange(rows * length, device=bounds.device)
    document = torch.bucketize(place, bounds[1:], right=True).view(rows, 1, length)
    back = place[:length, None] - place[:length]  # (T, T)
    near = back >= 0 if window is None else (back >= 0) & (back < window)
    return ((document.mT == document) & near)[:, None]


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None, dropout: float = 0.0) -> Tensor:
    """Return softmax(scale·QKᵀ)V over the pairs that the mask allows."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)


def _takes_flash(query: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention's kernel takes these tensors."""
    size = query.shape[-1]
    return query.is_cuda and query.dtype in _HALF and size == value.shape[-1] and size <= _LARGEST_HEAD and size % 8 == 0


def _document_by_document(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float | None, window: int | None, dropout: float
) -> Tensor:
    """Compute the same as `varlen_attention`, with one call per document, whose cost is the square of its own length."""
    rows, _, length, _ = query.shape
    lengths = [end - begin for begin, end in pairwise(bounds.tolist()) if end > begin]
    parts = (tensor.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None].split(lengths, 2) for tensor in (query, key, value))
    found = [_attend(q, k, v, scale, window, dropout) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(found, 2)[0].unflatten(1, (rows, length)).transpose(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None, dropout: float) -> Tensor:
    """Return causal attention of one document: (1, H, L, E)."""
    length = query.shape[2]
    if window is not None and window < length:
        bounds = torch.tensor([0, length], device=query.device)
        return masked_attention(query, key, value, packed_mask(bounds, 1, length, window), scale, dropout)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped)
