"""Ready-made LightningDataModules for the tasks.

May import: ``utils``, ``ops``.
"""

from lightning_lora.data.instructions import InstructionDataModule

__all__ = ["InstructionDataModule"]
