"""Ready-made LightningModules around Hugging Face models (the command line's tasks).

May import: everything up to ``callbacks``. Only files named ``hf`` import transformers.
"""

from lightning_lora.tasks.causal_lm import CausalLMTask

__all__ = ["CausalLMTask"]
