"""Lightning callbacks."""

from lightning_lora.callbacks.lora import LoRACallback

__all__ = ["LoRACallback"]
