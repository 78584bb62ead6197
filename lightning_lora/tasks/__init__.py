"""Ready-made LightningModules around Hugging Face models (the command line's tasks).

May import: everything up to ``callbacks`` and ``data``. Only files named ``hf`` import transformers.
"""

from lightning_lora.tasks.base import rows_of
from lightning_lora.tasks.causal_lm import CausalLMTask
from lightning_lora.tasks.dpo import DPOTask
from lightning_lora.tasks.image_classification import ImageClassificationTask
from lightning_lora.tasks.seq2seq import Seq2SeqTask
from lightning_lora.tasks.sequence_classification import SequenceClassificationTask
from lightning_lora.tasks.token_classification import TokenClassificationTask

__all__ = [
    "CausalLMTask",
    "DPOTask",
    "ImageClassificationTask",
    "Seq2SeqTask",
    "SequenceClassificationTask",
    "TokenClassificationTask",
    "rows_of",
]
