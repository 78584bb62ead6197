"""What optimizers need to know of LoRA: which parameters, in which groups, under which names; and GaLore, which needs no LoRA."""

from lightning_lora.optim.groups import lora_param_groups
from lightning_lora.optim.lora_plus import lora_plus

__all__ = ["lora_param_groups", "lora_plus"]
