"""Optimizers for LoRA: parameter groups, LoRA+, preconditioned gradients, state by parameter name. Also GaLore, which does not use LoRA.

May import: everything up to ``adapter_io``.
"""

from lightning_lora.optim.galore import GaLoreConfig, galore_optimizer, galore_param_groups
from lightning_lora.optim.groups import lora_param_groups
from lightning_lora.optim.lora_plus import apply_lora_plus
from lightning_lora.optim.preconditioning import apply_preconditioner
from lightning_lora.optim.resize import resize_ranks

__all__ = [
    "GaLoreConfig",
    "apply_lora_plus",
    "apply_preconditioner",
    "galore_optimizer",
    "galore_param_groups",
    "lora_param_groups",
    "resize_ranks",
]
