"""Initialize A and B. Each function fills the factors of one layer; the layer tells which factor is which.

May import: everything up to ``layers``.

An adapted model starts as its base. Most inits ensure that by B·A = 0. Those that compute A and B ≠ 0 are marked
:func:`~lightning_lora.registry.keeps_start`: the layer keeps the start B₀·A₀ and adds ``s·(B·A − B₀·A₀)``. Papers and PEFT subtract
s·B₀·A₀ from the base weight instead, which gives the same sum. Here the base stays unchanged, bit for bit.

An init that reads data names what it gathers of each layer (:mod:`~lightning_lora.inits.statistics`).
:func:`~lightning_lora.initialize_from_data` gathers it from a few batches and fills the layers. Training before that raises.
"""

from lightning_lora.inits import corda, eva, loftq, lora_ga, without_data

__all__ = ["corda", "eva", "loftq", "lora_ga", "without_data"]
