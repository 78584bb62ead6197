"""Adds an update to a frozen weight, and subtracts it again bit for bit.

Merging rounds: ``m = round(w + Δ)``. Subtracting Δ restores ``w`` for most entries, but not for all. A second
copy of every weight would double the memory. So :func:`merge` stores only the entries where ``round(m − Δ)`` differs from
``w``, and a checksum of ``w``. In bf16 these are about 1.3 % of the entries at an update of 1 % of the weight, 7.6 % at 10 %.
:func:`unmerge` recomputes Δ, repairs those entries and compares the checksum. If the adapter changed in between, or
the device multiplies differently, it raises an error. The base weight never drifts.

Some formulas scale the weight too: ``m = round(γ∘(w + Δ))``, with one number γ per output. γ depends on ``w`` itself, so the undo
record stores it. The inverse is ``round(m/γ − Δ)``. It is computed in a precision above the weight's, where it differs about as rarely.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.rounding import Rounding, measure
from lightning_lora.utils.checksums import bits, checksum


@dataclass
class SparseUndo:
    """Undo record of a merge into a floating-point weight. The adapter itself is needed too."""

    index: Tensor  # flat positions where subtraction does not restore the base weight
    value: Tensor  # the base weight at these positions
    checksum: str  # of the full base weight
    out_scale: Tensor | None = None  # γ, a small tensor expanded to the weight's shape

    @property
    def nbytes(self) -> int:
        """Memory of the undo record in bytes."""
        return self.index.nbytes + self.value.nbytes + (0 if self.out_scale is None else self.out_scale.untyped_storage().nbytes())


@dataclass
class OriginalUndo:
    """Undo record for a weight that was replaced because another module uses it: the original parameter, unchanged."""

    weight: nn.Parameter


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Within it, compute full fp32 products, whatever the user set for training (TF32, bf16x3, autocast)."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    kept = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, kept, strict=True):
            backend.fp32_precision = precision


def merged_weight(weight: Tensor, delta: Tensor, out_scale: Tensor | None = None, groups: Sequence[Any] = ()) -> tuple[Tensor, Rounding]:
    """Return ``round(γ∘(w + Δ))``, and what rounding lost of the change.

    Computes in Δ's dtype (fp32 or wider). If the tensors are shards, ``groups`` are the process groups over which the weight is sharded.
    """
    wide = weight.to(_dtype(weight, delta, out_scale))
    exact = wide + delta if out_scale is None else (wide + delta) * out_scale
    merged = exact.to(weight.dtype)
    change = delta if out_scale is None else exact - wide
    return merged, measure(wide, change, merged, groups)


def merge(weight: Tensor, delta: Tensor, out_scale: Tensor | None = None, *, reversible: bool = True) -> tuple[SparseUndo | None, float]:
    """Add ``delta`` to ``weight`` in place.

    Args:
        weight: the frozen weight, any floating dtype.
        delta: the update, same shape, fp32 or wider.
        out_scale: γ, the factor on the sum, in the weight's shape (a view of a small tensor); default 1.
        reversible: keep what :func:`unmerge` needs; False saves that memory, and the merge cannot be undone.

    Returns:
        The undo record (or None), and the share of the update that rounding lost, ‖(m − w) − Δ‖ / ‖Δ‖.
    """
    merged, undo, rounding = merged_with_undo(weight, delta, out_scale, reversible=reversible)
    weight.copy_(merged)
    return undo, rounding.lost


def merged_with_undo(
    weight: Tensor, delta: Tensor, out_scale: Tensor | None = None, *, reversible: bool = True, groups: Sequence[Any] = ()
) -> tuple[Tensor, SparseUndo | None, Rounding]:
    """Return the merged weight that :func:`merge` would write, its undo record, and what rounding lost. Change nothing."""
    merged, rounding = merged_weight(weight, delta, out_scale, groups)
    undo = None
    if reversible:
        back = _taken_out(merged, delta, out_scale)
        index = (bits(back) != bits(weight)).flatten().nonzero().flatten()
        index = index.to(torch.int32) if weight.numel() < 2**31 else index
        undo = SparseUndo(index, weight.flatten()[index].clone(), checksum(weight), out_scale)
    return merged, undo, rounding


def unmerge(weight: Tensor, delta: Tensor, undo: SparseUndo) -> Tensor:
    """Return the base weight that :func:`merge` started from, bit for bit, as a new tensor. ``weight`` is not changed.

    Raises:
        ValueError: the recomputed ``delta`` is not the one that was merged.
    """
    changed = "the base weight would not come back bit for bit: the adapter, the merged weight or the device changed since the merge"
    if weight.dtype != undo.value.dtype:
        raise ValueError(changed)
    base = _taken_out(weight, delta, undo.out_scale).contiguous()
    base.view(-1)[undo.index.to(base.device)] = undo.value.to(base.device)
    if checksum(base) != undo.checksum:
        raise ValueError(changed)
    return base


def _taken_out(merged: Tensor, delta: Tensor, out_scale: Tensor | None) -> Tensor:
    wide = merged.to(_dtype(merged, delta, out_scale))
    return (wide - delta if out_scale is None else wide / out_scale.to(merged.device) - delta).to(merged.dtype)


def _dtype(weight: Tensor, delta: Tensor, out_scale: Tensor | None) -> torch.dtype:
    """Return the dtype to compute in.

    The weight's own dtype costs one rounding. With γ, a division and a subtraction in the weight's precision would add two.
    """
    above = out_scale is not None and delta.dtype == weight.dtype and weight.device.type != "mps"  # MPS has no float64
    return torch.float64 if above else delta.dtype
