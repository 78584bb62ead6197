"""Quantized weights: what any library's format can do (``formats``), and one file per library that registers its formats.

May import: ``utils``, ``registry``, ``ops``. No library is imported for a model that does not use it.
"""

from lightning_lora.quantization import bitsandbytes, torchao

__all__ = ["bitsandbytes", "torchao"]
