"""Ready-made LightningDataModules for the tasks.

May import: ``utils``, ``storage``, ``ops``.
"""

from lightning_lora.data.classification import ClassificationDataModule
from lightning_lora.data.images import ImageClassificationDataModule
from lightning_lora.data.instructions import InstructionDataModule
from lightning_lora.data.preferences import PreferenceDataModule
from lightning_lora.data.seq2seq import Seq2SeqDataModule
from lightning_lora.data.token_classification import TokenClassificationDataModule

__all__ = [
    "ClassificationDataModule",
    "ImageClassificationDataModule",
    "InstructionDataModule",
    "PreferenceDataModule",
    "Seq2SeqDataModule",
    "TokenClassificationDataModule",
]
