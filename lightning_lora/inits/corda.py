"""CorDA: A and B start as a part of the weight that is chosen by the covariance of its inputs (arXiv:2406.05223, section 3.2).

With C the covariance, ``W·C = U·S·Vᵀ``, so ``W = U·S·Vᵀ·C⁻¹``. The largest singular values are what the inputs use most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_lora.inits.statistics import MeanMatrix, signs
from lightning_lora.layers.filling import fill_random
from lightning_lora.layers.spec import Option
from lightning_lora.registry import keeps_start, register_init

if TYPE_CHECKING:
    from lightning_lora.layers.base import LoRALayer

_MODES = ("ipm", "kpm")
_DAMPING, _INVERSE_ERROR = 0.01, 0.05  # the authors'


class InputCovariance(MeanMatrix):
    """The mean of xᵀ·x over calls of a layer, each x divided by its largest entry, as the authors' code and PEFT have it."""

    def __init__(self, layer: LoRALayer) -> None:
        super().__init__(layer)
        self.pair: tuple[Tensor, Tensor] | None = None

    @classmethod
    def shape(cls, layer: LoRALayer) -> tuple[int, int]:
        """(in, in)."""
        return layer.lora_A.shape[1], layer.lora_A.shape[1]

    def add(self, x: Tensor, *dy: Tensor) -> None:
        """Add xᵀ·x of one call."""
        largest = x.max().abs()
        x = x / (largest if largest > 0 else x.abs().max().clamp_min(torch.finfo(x.dtype).tiny))
        self.include(x.mT @ x)

    def condense(self) -> None:
        """Compute A and B from the weight and the covariance."""
        r = self.layer.rank
        C, inverse = _inverted(self.sum / self.calls)
        U, S, Vh = torch.linalg.svd(self.weight() @ C, full_matrices=False)
        chosen = slice(0, r) if self.layer.spec.init_options["mode"] == "ipm" else slice(len(S) - r, len(S))
        sign = signs(Vh)
        U, Vh = U * sign, Vh * sign[:, None]
        root = (S[chosen] / self.layer.scaling).sqrt()
        self.pair = root[:, None] * (Vh[chosen] @ inverse), U[:, chosen] * root
        del self.sum

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return A and B."""
        assert self.pair is not None
        return self.pair


def _inverted(C: Tensor) -> tuple[Tensor, Tensor]:
    """Return C and its inverse, with more and more of its mean diagonal added until the inverse is one."""
    eye, damping = torch.eye(len(C), dtype=C.dtype, device=C.device), _DAMPING
    mean = float(C.diagonal().mean()) or 1 / _DAMPING  # the identity for inputs that are all zero: they prefer no part of the weight
    while True:
        damped = C + damping * mean * eye
        inverse = torch.linalg.inv(damped)
        if float(torch.dist(damped @ inverse, eye)) < _INVERSE_ERROR:
            return damped, inverse
        damping *= 2


@register_init("corda", data=InputCovariance, options={"mode": Option("ipm", lambda value: value in _MODES, f"one of {', '.join(_MODES)}")})
@keeps_start
def corda(layer: LoRALayer) -> None:
    """Set s·B·A to a part of the weight, by the covariance of its inputs (CorDA, arXiv:2406.05223, equations 1 to 4).

    Options:
        mode: ``ipm``, instruction-previewed, the default: the part of the largest singular values, for batches of the task, which is then
            learned faster. ``kpm``, knowledge-preserved: the part of the smallest, for batches of what must not be forgotten.
    """
    fill_random(layer)
