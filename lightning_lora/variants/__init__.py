"""The update's formulas, one file per variant. Importing this package registers them.

A variant is a mixin that precedes the kind in an adapted layer's MRO. ``plain``, the LoRA of the paper, adds nothing to the kinds,
so its mixin is ``object``. A variant names no kind, no init and no other variant.

May import: everything up to ``layers``.
"""

from lightning_lora.registry import register_variant
from lightning_lora.variants import dora, lora_bias, lora_fa, lora_xs, vera
from lightning_lora.variants.adalora import shrink_adalora

register_variant("plain")(object)

__all__ = ["dora", "lora_bias", "lora_fa", "lora_xs", "shrink_adalora", "vera"]
