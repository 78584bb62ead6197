"""Ready-made LightningModules over Hugging Face models (the command line's tasks)."""

from lightning_lora.tasks.causal_lm import CausalLMTask

__all__ = ["CausalLMTask"]
