"""What a data module takes from the task, so that the model is named once: its tokenizer or image processor."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule


def of_task(data: LightningDataModule, name: str) -> Any:
    """Return an attribute of the LightningModule that runs with a data module.

    Raises:
        ValueError: It has none of this name.
    """
    module = data.trainer.lightning_module if data.trainer is not None else None
    found = getattr(module, name, None)
    if found is None:
        raise ValueError(
            f"{type(data).__name__} takes its {name} from the LightningModule, but {type(module).__name__} has no `{name}`; "
            f"set self.{name} there, or use one of the tasks"
        )
    return found
