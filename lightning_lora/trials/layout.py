"""Where each trial's rows are in a batch that joins the batches of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a joint batch is made of k trials' batches.

    A part has the positions that its trial computes alone, no others: dropout then draws one number for each of the same entries.

    Attributes:
        sizes: rows of each trial; if laid end to end, positions of each.
        lengths: the longest row of each trial, where rows are padded to the longest of all; None where they are equal.
        end_to_end: all rows are in one row (1, N).
    """

    sizes: Sequence[int]
    lengths: Sequence[int] | None = None
    end_to_end: bool = False

    def is_even(self) -> bool:
        """Return True if all trials have as many rows or positions, and none has padding of its own."""
        return self.lengths is None and len(set(self.sizes)) == 1

    def split(self, x: Tensor) -> list[Tensor]:
        """Return each trial's part of a tensor (rows, ...) or (1, N, ...).

        Raises:
            ValueError: the tensor has other rows than the batch.
        """
        dim, total = int(self.end_to_end), sum(self.sizes)
        if x.ndim <= dim or x.shape[dim] != total or (self.end_to_end and x.shape[0] != 1):
            raise ValueError(f"a layer gets an input of shape {tuple(x.shape)}, and the batch has {total} {'tokens' if dim else 'rows'}")
        parts = list(x.split(list(self.sizes), dim))  # whose backward pass is one concatenation
        if not self._is_padded(x):
            return parts
        return [part[:, :length] for part, length in zip(parts, self.lengths or (), strict=True)]

    def join(self, parts: Sequence[Tensor], x: Tensor) -> Tensor:
        """Invert :meth:`split`: the parts of an output, given the input. What no trial computes is 0."""
        if self._is_padded(x):
            longest = x.shape[1]
            parts = [F.pad(part, (0, 0) * (part.ndim - 2) + (0, longest - part.shape[1])) for part in parts]
        return torch.cat(list(parts), int(self.end_to_end))

    def _is_padded(self, x: Tensor) -> bool:
        """Return True if a tensor has positions that some trial does not have: (B, T, d), or ids (B, T)."""
        if self.lengths is None:
            return False
        if x.ndim > 3:
            raise ValueError(f"a layer gets an input of shape {tuple(x.shape)} with rows of several lengths, whose positions are unknown")
        return x.ndim == (3 if x.is_floating_point() else 2) and x.shape[1] == max(self.lengths)
