"""LoRA with a bias on B: ``W·x + scaling · (B·A·dropout(x) + b)`` (PEFT 0.21, ``lora_bias``).

Its use is an adapter that was extracted from a fully tuned model, whose biases changed too. A merge adds ``scaling · b`` to the layer's own
bias. A layer without one cannot be merged, as in PEFT.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.merge_plans import Plan
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.layers.state import Quantized
from lightning_lora.registry import belongs_to_packed_base, data_of, frozen_factor, has_start, register_variant
from lightning_lora.utils.sharding import full_tensor, local_shard, local_tensor

BIAS = "lora_B_bias"


@register_variant("lora_bias")
class LoRABias(LoRALayer):
    """The mixin: a bias on B, for kinds whose module may have a bias.

    Attributes:
        lora_B_bias: b, (out,), zero at the start.
    """

    peft_fields: ClassVar[dict[str, Any]] = {"lora_bias": True}

    lora_B_bias: nn.Parameter

    @classmethod
    def parameter_shapes(cls, module: Any, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return the kind's shapes, and b: (out,)."""
        return super().parameter_shapes(module, spec) | {BIAS: (cls.outputs(module, spec),)}

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Raise ValueError also for modules that never have a bias, for several weights in one module, and for slices."""
        super().check(module, spec)
        what = f"variant={spec.config.variant!r}"
        if cls.lora_base is nn.Module or "bias" not in module._parameters:
            raise ValueError(f"{what} adds to a layer's bias, and this is no layer with one weight and a bias; exclude it")
        if spec.slices is not None:
            raise ValueError(f"{what} has one bias for a whole layer; name the fused layer itself in target_modules, instead of its slices")
        init = spec.config.init
        if has_start(init) or frozen_factor(init) or data_of(init) or belongs_to_packed_base(init):
            raise ValueError(f"{what} has files in PEFT's format, which has no init={init!r} beside a bias; leave one of them out")

    @classmethod
    def adapter_placements(cls, placement: Any) -> dict[str, Any]:
        """Return the kind's placements, and for b that of B's rows."""
        placements = super().adapter_placements(placement)
        return placements | {BIAS: placements["lora_B"]}

    def reset_lora_parameters(self) -> None:
        """Reset A and B with the init, and b to zero."""
        super().reset_lora_parameters()
        with torch.no_grad():
            local_tensor(self.lora_B_bias).zero_()

    def lora_update(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the kind's sum plus ``scaling · b``."""
        return super().lora_update(y, x) + self.per_output(self.lora_B_bias * self.scaling).to(y.dtype)

    def adds_nothing(self) -> bool:
        """True if B·A and b are zero."""
        return super().adds_nothing() and not bool(full_tensor(self.lora_B_bias.detach()).any())

    # Merging.

    @classmethod
    def never_merges(cls, module: Any) -> str | None:
        """Return a reason if the layer has no bias."""
        if module._parameters.get("bias") is None:
            return "its adapter has a bias (variant='lora_bias') and the layer has none to add that to: leave it unmerged"
        return super().never_merges(module)

    def merge_refusal(self, quantized: Quantized | None = None) -> str | None:
        """Return a reason also if the layer has no bias."""
        return self.never_merges(self) or super().merge_refusal(quantized)

    def merged_beside(self, name: str) -> Tensor | None:
        """Return the layer's bias plus ``scaling · b``, in full."""
        if name != "bias":
            return None
        bias = full_tensor(self._parameters["bias"].detach())  # type: ignore[union-attr]
        added = full_tensor(self.lora_B_bias.detach()) * self.scaling
        return (bias + added.to(bias.device)).to(bias.dtype)

    def merge_plan(self, device: torch.device | str | None, reversible: bool, quantized: Quantized | None) -> Plan:
        """Plan the kind's merge and that of the bias. The merge's record has the base's bias itself: it is small."""
        weight, bias, merged = super().merge_plan(device, reversible, quantized), self._parameters["bias"], self.merged_beside("bias")
        assert bias is not None and merged is not None
        base, new = bias.detach().clone(), local_shard(merged, bias)

        def carry_out() -> None:
            _both(bias, new, weight)
            assert self.lora_state.merge is not None
            self.lora_state.merge.beside["bias"] = base

        return carry_out

    def unmerge_plan(self) -> Plan:
        """Plan to restore weight and bias."""
        assert self.lora_state.merge is not None
        weight, base, bias = super().unmerge_plan(), self.lora_state.merge.beside["bias"], self._parameters["bias"]
        assert bias is not None
        return partial(_both, bias, local_tensor(base), weight)

    # Files.

    def to_peft(self) -> dict[str, Tensor]:
        """Return the kind's tensors, and b."""
        return super().to_peft() | {"lora_B.bias": self.lora_B_bias}


def _both(bias: nn.Parameter, value: Tensor, weight: Plan) -> None:
    """Set a bias and carry out the plan for the weight, or neither."""
    mine = local_tensor(bias.detach())
    before = mine.clone()
    mine.copy_(value)
    try:
        weight()
    except BaseException:
        mine.copy_(before)
        raise
