"""LoRA-FA: A stays as it starts, at random, and only B trains (arXiv:2308.03303, section 3).

Half the trained parameters and optimizer state, and the backward pass needs no activation of the width of the input: B's
gradient takes ``A·x`` alone. To files and servers it is plain LoRA. Where the kind's roles swap (embeddings) it is B that starts
at random, and stays.
"""

from __future__ import annotations

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.registry import register_variant


@register_variant("lora_fa")
class LoRAFA(LoRALayer):
    """Plain LoRA with the factor that starts at random frozen."""

    def init_adapter(self, spec: LayerSpec) -> None:
        """As plain LoRA, then freeze."""
        super().init_adapter(spec)
        random, _ = self.lora_factors()
        random.requires_grad_(False)
