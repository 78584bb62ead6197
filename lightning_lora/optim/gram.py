"""Multiply the gradients of A and B by the inverse Gram matrix of the other factor, many layers at once.

Layers of equal shapes are stacked. All is computed in float64, which neither TF32 nor autocast rounds: the Gram matrix squares the factor's
condition number, and the damping is far below its largest entries. A step costs
4·r²·(in + out) floating-point operations per layer, and two inverses of r×r.

A sharded factor that is cut along its long side sums its Gram matrix over the ranks. One that is cut along the rank is gathered, with its
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from lightning_lora.utils.sharding import cut_dimensions, full_tensors, is_sharded, local_shard, local_tensor, shard_groups

AT_ONCE = 1 << 24  # elements of one factor that are stacked at once: bounds the memory of a step, 128 MiB in float64


class Pair(NamedTuple):
    """The factors of one adapted weight.

    Attributes:
        A, B: parameters.
        rows: rows of B for each product in it; one entry if all share it; see :meth:`Factors.factor_rows`.
        power: what both gradients are multiplied by.
        trains: whether A's and B's gradients are to be preconditioned.
    """

    A: Tensor
    B: Tensor
    rows: tuple[int, ...]
    power: float
    trains: tuple[bool, bool]


@torch.no_grad()
def precondition(pairs: Sequence[Pair], damping: float) -> None:
    """Precondition the gradients of A and B in place. Under sharding a collective.

    Args:
        pairs: factors. Those without a gradient are passed over.
        damping: δ.
    """
    groups: dict[Any, list[Pair]] = {}
    for pair in pairs:
        factors = pair.A, pair.B
        wanted = tuple(train and factor.grad is not None for train, factor in zip(pair.trains, factors, strict=True))
        if any(wanted):
            where = [getattr(factor, name, None) for factor in factors for name in ("device_mesh", "placements")]
            key = (pair.A.shape, pair.B.shape, pair.rows, pair.power, wanted, pair.A.device, pair.A.dtype, *where)
            groups.setdefault(key, []).append(pair)
    for (A_shape, B_shape, *_), group in groups.items():
        number = max(1, AT_ONCE // max(A_shape.numel(), B_shape.numel()))
        for start in range(0, len(group), number):
            _precondition(group[start : start + number], damping)


def _precondition(pairs: list[Pair], damping: float) -> None:
    """Precondition the gradients of factors of equal shapes."""
    train_A, train_B = pairs[0].trains
    grads_A = [_placed(pair.A) for pair in pairs if train_A and pair.A.grad is not None]
    grads_B = [_placed(pair.B) for pair in pairs if train_B and pair.B.grad is not None]
    power = pairs[0].power
    if grads_A:
        B, g = _Stack([pair.B for pair in pairs], pairs[0], True), _Stack(grads_A, pairs[0], False)
        grams = [B.summed(X.mT @ X) for X in B.products()]
        g.write(grads_A, [_inverse(gram, g, damping, power) @ G for gram, G in zip(grams, g.products(), strict=True)])
    if grads_B:
        A, g = _Stack([pair.A for pair in pairs], pairs[0], False), _Stack(grads_B, pairs[0], True)
        grams = [A.summed(X @ X.mT) for X in A.products()]
        g.write(grads_B, [G @ _inverse(gram, g, damping, power) for gram, G in zip(grams, g.products(), strict=True)])


def _placed(factor: Tensor) -> Tensor:
    """Return a factor's gradient, placed as the factor is. Tensor parallelism leaves sums over the ranks to the optimizer."""
    gradient: Any = factor.grad
    if is_sharded(gradient) and gradient.placements != factor.placements:  # type: ignore[attr-defined]
        factor.grad = gradient = gradient.redistribute(placements=factor.placements)  # type: ignore[attr-defined]
    return gradient


def _inverse(gram: Tensor, g: _Stack, damping: float, power: float) -> Tensor:
    """Return ``power·(gram + δI)⁻¹`` for each product of a gradient.

    Its error is not looked at, because the device would have to be waited for. A factor that several products share has one matrix, which
    serves each of them. Its own gradient is divided by the sum of theirs.
    """
    n = len(g.values)
    products = g.k if g.rows is None else 1
    if products == 1 and len(gram) > n:
        gram = gram.unflatten(0, (n, -1)).sum(1)
    gram.diagonal(dim1=-2, dim2=-1).add_(damping)
    inverse = torch.linalg.inv_ex(gram)[0].mul_(power)
    return inverse if len(inverse) == n * products else inverse.repeat_interleave(products, 0)


class _Stack:
    """A factor of n layers, or its gradients, as one tensor.

    Args:
        tensors: n of equal shapes and placements.
        pair: one of the layers.
        of_b: True for B.
    """

    def __init__(self, tensors: Sequence[Tensor], pair: Pair, of_b: bool) -> None:
        first, rank = tensors[0], pair.B.shape[1]
        self.k = len(pair.rows) if of_b else pair.A.shape[0] // rank
        self.rows: Sequence[int] | None = None
        if len(set(pair.rows)) > 1:
            self.rows = pair.rows if of_b else (rank,) * self.k
        # Along its long side a factor may stay cut, if what is there belongs to one product.
        long = set(range(1, first.ndim)) if not of_b else {0} if self.k == 1 else set()
        self.gathered = not cut_dimensions(first) <= long
        self.groups = () if self.gathered else shard_groups(first)
        whole = full_tensors(tensors) if self.gathered else torch.stack([local_tensor(tensor) for tensor in tensors])
        self.shape = whole.shape
        self.values = whole.flatten(2).to(torch.float32 if whole.device.type == "mps" else torch.float64)  # MPS has no float64

    def products(self) -> list[Tensor]:
        """Return (n·k, rows, columns) for k products of equal rows; else (n, rows, columns) for each product."""
        if self.rows is not None:
            return list(self.values.split(self.rows, 1))
        n, rows, columns = self.values.shape
        return [self.values.reshape(n * self.k, rows // self.k, columns)]

    def summed(self, gram: Tensor) -> Tensor:
        """Return a Gram matrix of which each rank has a part, on every rank."""
        for group in self.groups:
            torch.distributed.all_reduce(gram, group=group)
        return gram

    def write(self, gradients: Sequence[Tensor], products: Sequence[Tensor]) -> None:
        """Write new values, in the form of :meth:`products`, into the gradients."""
        n, _, columns = self.values.shape
        parts = [each.reshape(n, each.shape[0] // n * each.shape[1], columns) for each in products]
        whole = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).view(self.shape).to(gradients[0].dtype)
        mine = [local_shard(new, old) if self.gathered else new for new, old in zip(whole, gradients, strict=True)]
        torch._foreach_copy_([local_tensor(gradient) for gradient in gradients], mine)
