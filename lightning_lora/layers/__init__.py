"""Layer kinds: importing this package registers them."""

from lightning_lora.layers import conv, conv1d_hf, embedding
from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.layers.linear import LoRALinear

__all__ = ["LoRALayer", "LoRALinear", "conv", "conv1d_hf", "embedding", "lora_layers"]
