"""The Lightning callbacks ``LoRACallback`` and ``AdaLoRACallback``.

May import: everything up to ``strategies``.
"""

from lightning_lora.callbacks.adalora import AdaLoRACallback
from lightning_lora.callbacks.lora import LoRACallback

__all__ = ["AdaLoRACallback", "LoRACallback"]
