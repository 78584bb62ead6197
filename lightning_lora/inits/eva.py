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

from lightning_lora.inits.statistics import Statistics, signs
from lightning_lora.layers.filling import fill_random
from lightning_lora.layers.spec import Option, init_options_of
from lightning_lora.registry import register_init
from lightning_lora.utils.sharding import is_distributed

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
        directions: (k, in), each component times its singular value.
    """

    rows: int
    mean: Tensor
    spread: float
    directions: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Components:
        """Return those of x (n, in), all of them: its centred rows."""
        mean = x.mean(0)
        return cls(len(x), mean, float((x - mean).double().square().sum()), x - mean)

    def with_others(self, other: Components, many: int) -> Components:
        """Return the largest components of both sets of rows."""
        rows = self.rows + other.rows
        apart = (self.rows * other.rows / rows) ** 0.5 * (self.mean - other.mean)
        mean = self.mean + (other.mean - self.mean) * (other.rows / rows)
        spread = self.spread + other.spread + float(apart.double().square().sum())
        return Components(rows, mean, spread, torch.cat((self.directions, other.directions, apart[None]))).largest(many)

    def largest(self, many: int) -> Components:
        """Return the largest components alone."""
        return Components(self.rows, self.mean, self.spread, _largest(self.directions, many))


def _largest(rows: Tensor, many: int) -> Tensor:
    """Return S·Vh (many, in) of rows (n, in). It is exact for small matrices, and randomized as in PEFT for large ones."""
    if 2 * many < min(rows.shape):
        _, S, V = torch.svd_lowrank(rows, 2 * many, niter=4)
        Vh = V.mT
    else:
        _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    return (S[:, None] * Vh)[:many]


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
            for index, share in enumerate((each.sizes_of_components().square() / max(each.found.spread, 1e-300)).tolist())
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
        new = Components.of(x)
        self.found = new.largest(self.many) if self.found is None else self.found.with_others(new, self.many)

    def reduce(self) -> None:
        """Join the components of all processes, in the order of ranks."""
        super().reduce()
        if not is_distributed() or not self.finite:
            return
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        mine = None if self.found is None else (self.found.rows, self.found.mean.cpu(), self.found.spread, self.found.directions.cpu())
        torch.distributed.all_gather_object(parts, mine)
        joined = None
        for part in (Components(*part) for part in parts if part is not None):
            joined = part if joined is None else joined.with_others(part, self.many)
        self.found = joined

    def sizes_of_components(self) -> Tensor:
        """Return the singular values, descending."""
        assert self.found is not None
        return self.found.directions.double().norm(dim=1)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the components and zeros. With ``whiten`` each component is divided by the root of its singular value, as in PEFT."""
        assert self.found is not None
        S, rows = self.sizes_of_components()[:rank, None], self.found.directions[:rank]
        A = rows * signs(rows)[:, None] / S.clamp_min(torch.finfo(rows.dtype).tiny).to(rows.dtype)
        if self.layer.spec.init_options["whiten"]:
            A = A / S.sqrt().clamp_min(torch.finfo(rows.dtype).tiny).to(rows.dtype)
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
