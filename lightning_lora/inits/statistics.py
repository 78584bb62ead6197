"""What an init gathers of the data that pass through one layer. Each init that reads data has one subclass of :class:`Statistics`.

The rows are those that the weight multiplies: ``y = x·Wᵀ`` with x (n, in). Every process gathers of its own batches; together they have
what one process would have of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_lora.layers.filling import weight_matrix
from lightning_lora.utils.sharding import from_all_ranks, is_distributed

if TYPE_CHECKING:
    from lightning_lora.config import LoRAConfig
    from lightning_lora.layers.base import LoRALayer


EXACT = 256  # a smaller side up to which decompositions are exact


class Statistics:
    """The statistics of one layer.

    Attributes:
        layer: the adapted layer.
        rows: number of rows that were added; after :meth:`reduce`, on all processes.
        finite: False if a row had NaN or infinity.
    """

    #: True if the gradient of the layer's output is gathered too.
    gradients: ClassVar[bool] = False
    #: True if rows whose label is -100 are left out, beside those of padding.
    labelled: ClassVar[bool] = False

    def __init__(self, layer: LoRALayer) -> None:
        self.layer, self.rows, self.finite = layer, 0, True

    @classmethod
    def decides_ranks(cls, config: LoRAConfig) -> bool:
        """True if layers get other ranks than the config's, by what the data say."""
        return False

    @classmethod
    def ranks(cls, config: LoRAConfig, gathered: Mapping[str, Any]) -> dict[str, int]:
        """Return name → rank of each layer. 0: the layer gets no adapter."""
        return {name: each.layer.rank for name, each in gathered.items()}

    @classmethod
    def numbers(cls, layer: LoRALayer) -> int:
        """Return how many numbers a layer's statistics hold while they are gathered."""
        raise NotImplementedError(f"{cls.__name__} must define numbers")

    def least_rows(self) -> int:
        """Return the number of rows below which A and B are not determined."""
        return self.layer.rank

    def take(self, x: Tensor, dy: Tensor | None = None) -> None:
        """Add the rows x (n, in) and, if gradients are gathered, the gradient dy (n, out) of the loss by the output."""
        wide = [tensor.detach().to(self.layer.lora_A.dtype) for tensor in (x, dy) if tensor is not None]
        if not all(bool(tensor.isfinite().all()) for tensor in wide):
            self.finite = False
        elif len(x):
            self.rows += len(x)
            self.add(*wide)

    def add(self, x: Tensor, *dy: Tensor) -> None:
        """Add finite rows, at least one, in the factors' dtype."""
        raise NotImplementedError(f"{type(self).__name__} must define add")

    def reduce(self) -> None:
        """Make the statistics those of all processes. Every process has to call it."""
        rows, finite = zip(*from_all_ranks((self.rows, self.finite)), strict=True)
        self.rows, self.finite = sum(rows), all(finite)

    def condense(self) -> None:
        """Compute from the statistics what A and B need, and drop the rest. Called once there are enough rows."""

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return A (rank, in) and B (out, rank)."""
        raise NotImplementedError(f"{type(self).__name__} must define factors")

    def weight(self) -> Tensor:
        """Return the layer's weight, (out, in)."""
        return weight_matrix(self.layer, f"init={self.layer.lora_config.init!r}")

    def sizes(self) -> tuple[int, int]:
        """Return (out, in)."""
        return self.layer.lora_B.shape[0], self.layer.lora_A.shape[1]


class MeanMatrix(Statistics):
    """The mean over a layer's calls of a matrix of fixed size.

    Attributes:
        sum: the sum of the matrices.
        calls: how many there were; after :meth:`reduce`, on all processes.
    """

    def __init__(self, layer: LoRALayer) -> None:
        super().__init__(layer)
        self.sum: Tensor = torch.zeros((), device=layer.weight.device)
        self.calls = 0

    @classmethod
    def shape(cls, layer: LoRALayer) -> tuple[int, int]:
        """Return the matrix's shape."""
        raise NotImplementedError(f"{cls.__name__} must define shape")

    @classmethod
    def numbers(cls, layer: LoRALayer) -> int:
        """The matrix."""
        rows, columns = cls.shape(layer)
        return rows * columns

    def include(self, matrix: Tensor) -> None:
        """Add one call's matrix."""
        self.sum, self.calls = self.sum + matrix, self.calls + 1

    def reduce(self) -> None:
        """Add the sums of all processes."""
        super().reduce()
        if self.finite and self.rows:
            self.sum = over_processes(self.sum.to(self.layer.lora_A.dtype).expand(self.shape(self.layer)).contiguous())
            self.calls = int(over_processes(torch.tensor(self.calls, device=self.sum.device)))


def largest_svd(matrix: Tensor, many: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``many`` largest singular values S and their vectors U (m, many) and Vh (many, n), with the signs of :func:`signs`.

    For large matrices the decomposition is randomized, with 4 subspace iterations, as PEFT's.
    """
    if min(matrix.shape) <= max(EXACT, 2 * many):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(matrix, 2 * many, niter=4)
        Vh = V.mT
    U, S, Vh = U[:, :many], S[:many], Vh[:many]
    sign = signs(Vh)
    return U * sign, S, Vh * sign[:, None]


def signs(rows: Tensor) -> Tensor:
    """Return the signs (n,) that make the largest entry of each row (n, in) positive. A decomposition's own depend on rounding."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))[:, 0]
    return torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


def over_processes(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if is_distributed():
        torch.distributed.all_reduce(tensor)
    return tensor
