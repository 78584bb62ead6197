"""What optimizers need to know of LoRA: which parameters, in which groups, under which names; and GaLore, which needs no LoRA."""

from lightning_lora.optim.galore import GaLoreConfig, galore_optimizer, galore_param_groups
from lightning_lora.optim.groups import lora_param_groups
from lightning_lora.optim.lora_plus import apply_lora_plus

__all__ = ["GaLoreConfig", "apply_lora_plus", "galore_optimizer", "galore_param_groups", "lora_param_groups"]
