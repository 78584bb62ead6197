"""The libraries whose quantized layers are known: one file each registers how they are read, written and made."""

from lightning_lora.quantization import bitsandbytes, torchao

__all__ = ["ao", "bnb"]
