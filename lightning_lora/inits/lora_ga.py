"""LoRA-GA: A and B start such that the first step changes the weight as full fine-tuning would (arXiv:2407.05000, algorithm 1)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_lora.inits.statistics import MeanMatrix, largest_svd
from lightning_lora.layers.filling import fill_random
from lightning_lora.layers.spec import LayerSpec, Option
from lightning_lora.layers.whole_factors import check_whole
from lightning_lora.registry import keeps_start, register_init

if TYPE_CHECKING:
    from lightning_lora.layers.base import LoRALayer

_DIRECTIONS = ("ArB2r", "A2rBr", "ArBr")
_SCALES = ("stable", "singular_values")
_OPTIONS = {
    "direction": Option("ArB2r", lambda value: value in _DIRECTIONS, f"one of {', '.join(_DIRECTIONS)}"),
    "scale": Option("stable", lambda value: value in _SCALES, f"one of {', '.join(_SCALES)}"),
    "gamma": Option(16.0, lambda value: type(value) in (int, float) and 0 < value < math.inf, "a finite number > 0, such as 16"),
}


class WeightGradient(MeanMatrix):
    """The mean gradient of the base's weight, which is frozen: dyᵀ·x, from the layer's input and the gradient of its output."""

    gradients = True

    def __init__(self, layer: LoRALayer) -> None:
        super().__init__(layer)
        self.pair: tuple[Tensor, Tensor] | None = None

    @classmethod
    def shape(cls, layer: LoRALayer) -> tuple[int, int]:
        """(out, in)."""
        return layer.lora_B.shape[0], layer.lora_A.shape[1]

    def least_rows(self) -> int:
        """Two for each row of A: A and B take different singular vectors."""
        return 2 * self.layer.rank

    def add(self, x: Tensor, *dy: Tensor) -> None:
        """Add the gradient."""
        self.include(dy[0].mT @ x)

    def condense(self) -> None:
        """Compute A and B from the gradient's singular vectors (theorem 3.1), with the scale of theorem 3.2."""
        r, options, gradient = self.layer.rank, self.layer.spec.init_options, self.sum / self.calls
        U, S, Vh = largest_svd(gradient, 2 * r)
        of_A, of_B = {
            "ArB2r": (slice(0, r), slice(r, 2 * r)),
            "A2rBr": (slice(r, 2 * r), slice(0, r)),
            "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
        }[options["direction"]]
        scale = gradient.shape[0] ** 0.25 / options["gamma"] ** 0.5
        A, B = Vh[of_A], U[:, of_B] * scale
        self.pair = (A * scale, B) if options["scale"] == "stable" else (A, B * S[of_B])
        del self.sum

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return A and B."""
        assert self.pair is not None
        return self.pair


def _has_vectors_for_both(module: Any, spec: LayerSpec, A: tuple[int, ...], B: tuple[int, ...]) -> None:
    check_whole(module, spec, A, B, "init='lora_ga'", vectors=2)


@register_init("lora_ga", data=WeightGradient, options=_OPTIONS, check=_has_vectors_for_both)
@keeps_start
def lora_ga(layer: LoRALayer) -> None:
    """Fill A and B with singular vectors of the weight's gradient (LoRA-GA, arXiv:2407.05000, theorems 3.1 and 3.2).

    Options:
        direction: which of the 2r largest singular vectors A and B take. ``ArB2r``, the default: A the first r, B the next. ``A2rBr``: the
            reverse. ``ArBr``: A every second, B those between.
        scale: ``stable``, the default: both times out^¼/√gamma. ``singular_values``, as PEFT 0.21 has it: B alone, and also times the
            gradient's singular values.
        gamma: γ of that. Default 16.
    """
    fill_random(layer)
