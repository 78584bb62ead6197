"""The Lightning callbacks ``LoRACallback``, ``AdaLoRACallback`` and ``LoRAMonitor``.

May import: everything up to ``strategies``.
"""

from lightning_lora.callbacks.adalora import AdaLoRACallback
from lightning_lora.callbacks.lora import LoRACallback
from lightning_lora.callbacks.monitor import LoRAMonitor

__all__ = ["AdaLoRACallback", "LoRACallback", "LoRAMonitor"]
