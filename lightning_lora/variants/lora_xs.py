"""LoRA-XS: ``W + scaling · B·R·A``. A and B are the weight's singular vectors, frozen; only the r × r core R trains (arXiv:2405.17604,
equation 2).

The optimizer has r² numbers per layer, whatever the layer's size. Files and servers see the plain LoRA with ``R·A`` and B.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.factors import Exported
from lightning_lora.layers.filling import fill_factors, weight_matrix
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.layers.whole_factors import check_whole
from lightning_lora.registry import register_variant

_INIT = LoRAConfig().init


@register_variant("lora_xs")
class LoRAXS(LoRALayer):
    """The mixin: ``lora_R`` (r, r) between A and B, zero at the start. B has the singular values, A has orthonormal rows."""

    lora_R: nn.Parameter

    @classmethod
    def parameter_shapes(cls, module: Any, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return the kind's shapes of A and B, and R (r, r)."""
        return {**super().parameter_shapes(module, spec), "lora_R": (spec.rank, spec.rank)}

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Raise ValueError also for an init that is not the default, for groups, padding rows, and a rank above the weight's."""
        if spec.config.init != _INIT:
            raise ValueError(
                f"init={spec.config.init!r} and variant='lora_xs', which starts from the weight's singular vectors; leave it out"
            )
        super().check(module, spec)
        check_whole(module, spec, *cls.adapter_shapes(module, spec), "variant='lora_xs'")

    @classmethod
    def adapter_placements(cls, placement: Any) -> dict[str, Any]:
        """Return the kind's placements, and R replicated."""
        from torch.distributed.tensor import Replicate

        return super().adapter_placements(placement) | {"lora_R": Replicate()}

    def init_adapter(self, spec: LayerSpec) -> None:
        """Add the adapter as plain LoRA does, then freeze A and B."""
        super().init_adapter(spec)
        self.lora_A.requires_grad_(False)
        self.lora_B.requires_grad_(False)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Reset R to zero, and A and B to the weight's largest singular vectors."""
        nn.init.zeros_(self.lora_R)
        if not self.lora_A.is_meta:
            U, S, Vh = torch.linalg.svd(weight_matrix(self, "variant='lora_xs'"), full_matrices=False)
            fill_factors(self, Vh[: self.rank], U[:, : self.rank] * S[: self.rank])

    def base_was_loaded(self, loaded: set[str]) -> None:
        """Compute A and B again from the new weight, unless they were loaded too or R has trained."""
        super().base_was_loaded(loaded)
        if "lora_A" not in loaded and not self.lora_R.is_meta and not self.lora_R.any():
            self.reset_lora_parameters()

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``R·A`` and B."""
        return (self.lora_R @ self.lora_A.flatten(1)).view(self.lora_A.shape), self.lora_B

    def exported(self) -> Exported:
        """Return the plain LoRA that this layer computes."""
        return replace(super().exported(), config=replace(self.lora_config, variant="plain"))
