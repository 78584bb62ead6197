"""Ready-made LightningDataModules for the tasks.

May import: ``utils``, ``storage``, ``ops``.
"""

from lightning_lora.data.instructions import InstructionDataModule

__all__ = ["InstructionDataModule"]
