"""Rules that make one update of several. Each takes the updates as tensors of one shape, and a weight for each.

They act on dense updates ``s·B·A``, as the papers have it, or on the A's and on the B's, as PEFT's methods without ``_svd`` do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Majority = Literal["total", "frequency"]


@dataclass(frozen=True)
class Sparsity:
    """What a rule that drops entries needs.

    Attributes:
        density: share of the entries that are kept, in (0, 1].
        generator: of the entries that DARE drops at random.
        majority: how TIES elects a sign: by the sum of the entries, or by their number.
    """

    density: float
    generator: torch.Generator
    majority: Majority = "total"

    def largest(self, update: Tensor) -> Tensor:
        """Keep the entries of largest size, zero the rest."""
        kept = update.abs().flatten().topk(int(self.density * update.numel())).indices
        mask = torch.zeros(update.numel(), dtype=torch.bool, device=update.device)
        mask[kept] = True
        return update * mask.view(update.shape)

    def random(self, update: Tensor) -> Tensor:
        """Keep entries at random and divide them by the density, so that the expected value stays (DARE, arXiv:2311.03099, eq. 2)."""
        mask = torch.bernoulli(torch.full_like(update, self.density), generator=self.generator)
        return update * mask / self.density


def weighted_sum(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return ``Σ wᵢ·Δᵢ`` (task arithmetic, arXiv:2212.04089)."""
    total = updates[0] * weights[0]
    for update, weight in zip(updates[1:], weights[1:], strict=True):
        total.add_(update, alpha=weight)
    return total


def elected_sum(updates: Sequence[Tensor], weights: Sequence[float], majority: Majority) -> Tensor:
    """Elect a sign for each entry and average the weighted updates that have it (TIES, arXiv:2306.01708, section 3). As in PEFT, the
    election counts updates without their weights."""
    stacked = torch.stack(list(updates))
    votes = stacked if majority == "total" else stacked.sign()
    agree = stacked.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    weighted = stacked * torch.tensor(weights, dtype=stacked.dtype, device=stacked.device).view(-1, *[1] * (stacked.ndim - 1))
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def linear(updates: Sequence[Tensor], weights: Sequence[float], sparsity: Sparsity) -> Tensor:
    """Return the weighted sum."""
    return weighted_sum(updates, weights)


def magnitude_prune(updates: Sequence[Tensor], weights: Sequence[float], sparsity: Sparsity) -> Tensor:
    """Return the weighted sum of each update's largest entries."""
    return weighted_sum([sparsity.largest(update) for update in updates], weights)


def dare_linear(updates: Sequence[Tensor], weights: Sequence[float], sparsity: Sparsity) -> Tensor:
    """Return the weighted sum of the updates after DARE."""
    return weighted_sum([sparsity.random(update) for update in updates], weights)


def ties(updates: Sequence[Tensor], weights: Sequence[float], sparsity: Sparsity) -> Tensor:
    """Return TIES of the updates: their largest entries, signs elected."""
    return elected_sum([sparsity.largest(update) for update in updates], weights, sparsity.majority)


def dare_ties(updates: Sequence[Tensor], weights: Sequence[float], sparsity: Sparsity) -> Tensor:
    """Return TIES of the updates after DARE."""
    return elected_sum([sparsity.random(update) for update in updates], weights, sparsity.majority)


RULES: dict[str, Callable[[Sequence[Tensor], Sequence[float], Sparsity], Tensor]] = {
    rule.__name__: rule for rule in (linear, magnitude_prune, dare_linear, ties, dare_ties)
}
