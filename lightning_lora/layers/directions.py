"""The directions of a layer's factors, whatever its kind: row i of A and column i of B, of each product that the layer has.

A and B, and tensors of their shapes such as gradients and moments, are taken apart into matrices whose rows are the directions, and put
together again. Products of equal shapes are stacked. Where all products share an A or a B, there is one pair: the other factor's matrices
stand side by side in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lora.layers.factors import Factors


@dataclass(frozen=True)
class Directions:
    """How one layer's factors are divided.

    Attributes:
        rows: rows of B for each product in it; one entry if all share it (:meth:`Factors.factor_rows`).
        products: number of products in A; 1 if all share it.
    """

    rows: tuple[int, ...]
    products: int

    @classmethod
    def of(cls, layer: Factors) -> Directions:
        """Return those of a layer with an A and a B."""
        return cls(tuple(layer.factor_rows()), layer.lora_A.shape[0] // layer.lora_B.shape[1])

    def of_A(self, tensor: Tensor) -> list[Tensor]:
        """Return (pairs, r, columns) of a tensor of A's shape; one for each product if these have different sizes."""
        blocks = tensor.flatten(1).unflatten(0, (self.products, -1))  # (k, r, in)
        if len(self.rows) == 1:
            return [blocks.transpose(0, 1).flatten(1).unsqueeze(0)]
        return list(blocks.split(1)) if self._differ else [blocks]

    def of_B(self, tensor: Tensor) -> list[Tensor]:
        """Return (pairs, r, columns) of a tensor of B's shape, as :meth:`of_A`."""
        matrix = tensor.flatten(1)  # (out, r)
        if self._differ:
            return [part.t().unsqueeze(0) for part in matrix.split(list(self.rows))]
        return [matrix.unflatten(0, (self.products if len(self.rows) > 1 else 1, -1)).mT]

    def to_A(self, blocks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Invert :meth:`of_A`, for a tensor of this shape."""
        whole = torch.cat(list(blocks))
        if len(self.rows) == 1:
            whole = whole[0].unflatten(1, (self.products, -1)).transpose(0, 1)
        return whole.reshape(tuple(shape))

    def to_B(self, blocks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Invert :meth:`of_B`, for a tensor of this shape."""
        return torch.cat([block.mT.flatten(0, 1) for block in blocks]).reshape(tuple(shape))

    @property
    def _differ(self) -> bool:
        return self.products > 1 and len(set(self.rows)) > 1
