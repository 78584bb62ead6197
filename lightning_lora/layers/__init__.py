"""The adapted layer (``base``), how a module becomes one, how it merges, and one file per kind of layer.

Importing this package registers the kinds. A kind knows shapes. It names no variant and no init.

May import: ``utils``, ``config``, ``registry``, ``ops``, ``quantization``.
"""

from lightning_lora.layers import attention, conv, conv1d_hf, embedding, experts, tied_rows, token_rows
from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.layers.linear import LoRALinear

__all__ = ["LoRALayer", "LoRALinear", "attention", "conv", "conv1d_hf", "embedding", "experts", "lora_layers", "tied_rows", "token_rows"]
