"""LoRA-FA: A keeps its random start, and only B trains (arXiv:2308.03303, section 3).

It trains half the parameters and needs half the optimizer state. The backward pass needs no activation as wide as the input: B's
gradient needs ``A·x`` alone. Files and servers see plain LoRA. Where the kind swaps the roles (embeddings), B starts
at random and stays frozen.
"""

from __future__ import annotations

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.registry import register_variant


@register_variant("lora_fa")
class LoRAFA(LoRALayer):
    """Plain LoRA in which the factor that starts at random is frozen."""

    def init_adapter(self, spec: LayerSpec) -> None:
        """Add the adapter as plain LoRA does, then freeze the random factor."""
        super().init_adapter(spec)
        random, zero = self.lora_factors()
        random.requires_grad_(False)
        if not zero.requires_grad:
            raise ValueError(f"variant='lora_fa' freezes one factor and init={spec.config.init!r} the other, so nothing would train")
