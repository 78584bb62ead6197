"""Quantized weights: what any library's format can do (``formats``), and one file per library that registers its formats.

May import: ``utils``, ``registry``, ``ops``. A quantization library is imported only for a model that uses it.
"""

from lightning_lora.quantization import (
    bitsandbytes,
    bitsandbytes_quantize,
    block_float8,
    block_float8_experts,
    compressed_tensors,
    float8,
    float8_stacks,
    nf4_stacks,
    packed_experts,
    torchao,
)

__all__ = [
    "bitsandbytes",
    "bitsandbytes_quantize",
    "block_float8",
    "block_float8_experts",
    "compressed_tensors",
    "float8",
    "float8_stacks",
    "nf4_stacks",
    "packed_experts",
    "torchao",
]
