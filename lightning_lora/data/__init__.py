"""Ready-made LightningDataModules for the tasks."""

from lightning_lora.data.instructions import InstructionDataModule

__all__ = ["InstructionDataModule"]
