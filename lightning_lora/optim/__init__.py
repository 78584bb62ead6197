"""What optimizers need to know of LoRA: which parameters, in which groups, under which names."""

from lightning_lora.optim.groups import lora_param_groups

__all__ = ["lora_param_groups"]
