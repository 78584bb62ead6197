"""DoRA: LoRA changes the weight's direction, a vector sets its magnitude (arXiv:2402.09353, equation 5)::

    W' = m ∘ (W + s·B·A) / ‖W + s·B·A‖           one m and one norm per output, over all its inputs

The norm is a constant for the gradient (section 4.3). ``m`` starts at ‖W‖, so an adapted layer starts as its base. Dropout
applies to the input of everything that was adapted, never to the base's own. The authors' code and PEFT do the same:
``W·x + (g − 1)∘W·x̃ + g∘s·B·A·x̃`` with g = m/‖·‖ and x̃ the input after dropout. It costs a second product with W.

The norm needs no dense B·A (:mod:`lightning_lora.ops.weight_norm`). Its frozen part ‖W‖² is computed in each call: a write through
``weight.data`` changes no version counter, so a cached one could be stale without notice.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.ops.weight_norm import squared_norms
from lightning_lora.registry import register_variant
from lightning_lora.utils.autocast import no_autocast
from lightning_lora.utils.sharding import full_tensor, local_shard, local_tensor

MAGNITUDE = "lora_magnitude_vector"  # PEFT's name for m


@register_variant("dora")
class DoRA(LoRALayer):
    """The mixin: a magnitude vector, for any kind.

    Attributes:
        lora_magnitude_vector: m, (out,), fp32 or wider as the factors.
    """

    peft_fields: ClassVar[dict[str, Any]] = {"use_dora": True}

    lora_magnitude_vector: nn.Parameter

    @classmethod
    def parameter_shapes(cls, module: Any, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return the kind's shapes, and m: (out,)."""
        return super().parameter_shapes(module, spec) | {MAGNITUDE: (cls.outputs(module, spec),)}

    @classmethod
    def adapter_placements(cls, placement: Any) -> dict[str, Any]:
        """Return the kind's placements, and for m that of B's rows."""
        placements = super().adapter_placements(placement)
        return placements | {MAGNITUDE: placements["lora_B"]}

    def reset_lora_parameters(self) -> None:
        """Reset A and B with the init, then m to the resulting norm."""
        super().reset_lora_parameters()
        self.reset_magnitude()

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set m to ‖W + s·B·A‖, so that the layer starts as plain LoRA.

        Raises:
            ValueError: the weight cannot be read here.
        """
        if self.weight.ndim < 2:
            raise ValueError("variant='dora' needs the norms of the weight, which FSDP1 has flattened: apply LoRA before wrapping")
        norm = self._norm_of(full_tensor(self.base_weight().detach()), *(full_tensor(factor.detach()) for factor in self.factor_matrices()))
        local_tensor(self.lora_magnitude_vector).copy_(local_shard(norm, self.lora_magnitude_vector))

    def base_was_loaded(self, loaded: set[str]) -> None:
        """Compute a kept start again, then m, unless they were loaded too or the adapter has trained."""
        super().base_was_loaded(loaded)
        if MAGNITUDE not in loaded and self._starts():
            self.reset_magnitude()

    # The formula.

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``g∘(W·x + s·B·A·x) + b``, or with dropout the sum of the three terms above."""
        if self.merged or self.disabled or self.is_plain_sum() or not input.is_floating_point():  # dropping an id has no meaning
            return super().forward(input, *args, **kwargs)
        x = F.dropout(input, super().dropout_now())
        again = self.base_forward(x, *args, **kwargs)
        rest = self.base_forward(input, *args, **kwargs) - again
        return self.lora_output(self.lora_update(again, x)) + rest

    def dropout_now(self) -> float:
        """Return 0: the kind's update receives an input after dropout."""
        return 0.0

    def is_plain_sum(self) -> bool:
        """False also with dropout, which applies to the input of the base's product too."""
        return super().is_plain_sum() and not super().dropout_now()

    def output_scale(self) -> Tensor:
        """Return g = m/‖W + s·B·A‖, (out,)."""
        return self.lora_magnitude_vector / self.norm()

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return ‖W + s·B·A‖ of every output, (out,), in the factors' dtype."""
        return self._norm_of(self.base_weight(), *self.factor_matrices())

    def _norm_of(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        W = self.to_matrix(weight)
        with no_autocast(W):
            square = squared_norms(W, A, B, self.scaling)
        return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()

    # Merging: W' = g∘(W + s·B·A).

    def lora_delta(self) -> Tensor:
        """Return ``g∘(W + s·B·A) − W``, dense.

        Raises:
            RuntimeError: the layer is merged, so W is not available.
        """
        if self.merged:
            raise RuntimeError("the update of a merged DoRA layer depends on the base weight: unmerge first")
        delta = self.merge_delta()
        weight, out_scale = self._weight_for(delta), self.merge_scale(delta)
        return (weight + delta) * out_scale - weight

    def merge_delta(self) -> Tensor:
        """Return ``s·B·A``."""
        return super().lora_delta()

    def merge_scale(self, delta: Tensor) -> Tensor:
        """Return g in the weight's shape, computed from the dense sum, which a merge needs anyway."""
        rows = self.to_matrix(self._weight_for(delta) + delta)
        norm = rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny ** 0.5)
        out_scale = self.lora_magnitude_vector.view(norm.shape) / norm
        return self.from_matrix(out_scale.expand(rows.shape))

    def _weight_for(self, delta: Tensor) -> Tensor:
        return full_tensor(self.base_weight().detach()).to(delta)

    # Files.

    def to_peft(self) -> dict[str, Tensor]:
        """Return the tensors in PEFT's shapes: m is (1, out, 1, …) for convolutions."""
        if self.factor_matrices()[0].shape[:-2].numel() > 1:
            warnings.warn(
                f"{self} is a grouped convolution under DoRA: PEFT 0.21 takes other norms there, and would compute other outputs"
                " from this file.",
                stacklevel=3,
            )
        m = self.per_output(self.lora_magnitude_vector)
        return super().to_peft() | {MAGNITUDE: m if m.ndim == 1 else m.unsqueeze(0)}

    @classmethod
    def from_peft(cls, module: Any, part: str, tensor: Tensor, spec: LayerSpec) -> Tensor:
        """Return m as a vector, and other tensors as the kind does."""
        return tensor.flatten() if part == MAGNITUDE else super().from_peft(module, part, tensor, spec)
