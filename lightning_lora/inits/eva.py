"""EVA: A starts as the principal components of the layer's inputs, B as zero (Explained Variance Adaptation, arXiv:2410.07170, section 3).

The components come from an incremental singular value decomposition (Ross et al., 2008), batch by batch: of earlier rows only their mean
and the largest components are kept. Layers whose inputs vary in more directions get more of the ranks that the config gives in all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lora.inits.statistics import Statistics, largest_svd
from lightning_lora.layers.filling import fill_random
from lightning_lora.layers.spec import Option, init_options_of
from lightning_lora.registry import register_init
from lightning_lora.utils.sharding import from_all_ranks, is_distributed

if TYPE_CHECKING:
    from lightning_lora.config import LoRAConfig
    from lightning_lora.layers.base import LoRALayer

_OPTIONS = {
    "rho": Option(2.0, lambda value: type(value) in (int, float) and 1 <= value < math.inf, "a number ≥ 1, such as 2.0"),
    "whiten": Option(False, lambda value: isinstance(value, bool), "True or False"),
}


@dataclass
class Components:
    """The principal components of some rows.

    Attributes:
        rows: their number n.
        mean: (in,).
        spread: the sum of their squared distances from the mean.
        S: (k,), the components' singular values.
        Vh: (k, in), their directions.
    """

    rows: int
    mean: Tensor
    spread: float
    S: Tensor
    Vh: Tensor

    @classmethod
    def of(cls, x: Tensor, many: int) -> Components:
        """Return the largest components of x (n, in)."""
        mean = x.mean(0)
        _, S, Vh = largest_svd(x - mean, many)
        return cls(len(x), mean, _squares(x - mean), S, Vh)

    def with_rows(self, x: Tensor, many: int) -> Components:
        """Return the largest components, those of x (n, in) included."""
        mean = x.mean(0)
        return self._joined(len(x), mean, _squares(x - mean), x - mean, many)

    def with_others(self, other: Components, many: int) -> Components:
        """Return the largest components of both sets of rows."""
        return self._joined(other.rows, other.mean, other.spread, other.S[:, None] * other.Vh, many)

    def _joined(self, rows: int, mean: Tensor, spread: float, scaled: Tensor, many: int) -> Components:
        together = self.rows + rows
        apart = (self.rows * rows / together) ** 0.5 * (self.mean - mean)
        _, S, Vh = largest_svd(torch.cat((self.S[:, None] * self.Vh, scaled, apart[None])), many)
        return Components(together, self.mean + (mean - self.mean) * (rows / together), self.spread + spread + _squares(apart), S, Vh)


def _squares(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


class InputComponents(Statistics):
    """The largest principal components of a layer's inputs."""

    labelled = True

    def __init__(self, layer: LoRALayer) -> None:
        super().__init__(layer)
        self.found: Components | None = None
        self.many = min(round(layer.rank * layer.spec.init_options["rho"]), *self.sizes())

    @classmethod
    def decides_ranks(cls, config: LoRAConfig) -> bool:
        """True unless rho is 1."""
        return bool(init_options_of(config)["rho"] > 1)

    @classmethod
    def ranks(cls, config: LoRAConfig, gathered: Mapping[str, Any]) -> dict[str, int]:
        """Return the ranks by explained variance (section 3, "Adaptive rank allocation"): the largest components of all layers win."""
        if not cls.decides_ranks(config):
            return super().ranks(config, gathered)
        shares = [
            (-share, index, name)
            for name, each in gathered.items()
            for index, share in enumerate((each.found.S.double().square() / max(each.found.spread, 1e-300)).tolist())
        ]
        budget = sum(each.layer.rank for each in gathered.values())
        won = [name for _, _, name in sorted(shares, key=lambda share: share[:2])[:budget]]
        return {name: won.count(name) for name in gathered}

    @classmethod
    def numbers(cls, layer: LoRALayer) -> int:
        """The components."""
        return int(layer.spec.init_options["rho"] * layer.lora_A.numel())

    def least_rows(self) -> int:
        """One more than the components, because the mean is subtracted."""
        return self.many + 1

    def add(self, x: Tensor, *dy: Tensor) -> None:
        """Update the components."""
        self.found = Components.of(x, self.many) if self.found is None else self.found.with_rows(x, self.many)

    def reduce(self) -> None:
        """Join the components of all processes, in the order of ranks."""
        super().reduce()
        if not is_distributed() or not self.finite:
            return
        mine = self.found
        if mine is not None:
            mine = Components(mine.rows, mine.mean.cpu(), mine.spread, mine.S.cpu(), mine.Vh.cpu())
        joined: Components | None = None
        for part in filter(None, from_all_ranks(mine)):
            joined = part if joined is None else joined.with_others(part, self.many)
        self.found = joined

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the components and zeros. With ``whiten`` each component is divided by the root of its singular value, as in PEFT."""
        assert self.found is not None
        A = self.found.Vh[:rank]
        if self.layer.spec.init_options["whiten"]:
            A = A / self.found.S[:rank, None].sqrt().clamp_min(torch.finfo(A.dtype).tiny)
        return A, A.new_zeros(self.sizes()[0], rank)


@register_init("eva", data=InputComponents, options=_OPTIONS)
def eva(layer: LoRALayer) -> None:
    """Fill A with the principal components of the inputs, B with zeros (EVA, arXiv:2410.07170).

    Options:
        rho: a layer may get up to rho · rank of the ranks of all layers, and as few as none; 1: every layer keeps its rank. Default 2.0.
            The scaling of a layer stays.
        whiten: divide each component by the root of its singular value. Default False.
    """
    fill_random(layer)
