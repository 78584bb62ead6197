"""What a data module takes from the task, so that the model is named once: its tokenizer or image processor."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule
from typing_extensions import override


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


class FromTask(LightningDataModule):
    """A data module that takes its tokenizer from the task, and lets the task note things in its batches."""

    _tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The task's tokenizer.

        Raises:
            ValueError: The LightningModule has none.
        """
        return of_task(self, "tokenizer") if self._tokenizer is None else self._tokenizer

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return a batch that is still on the CPU, with what the task notes in it there (``note_padding``).

        Lightning passes over a module's own hook where the data module has one, so it is called here.
        """
        task: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        batch = task.on_before_batch_transfer(batch, dataloader_idx)
        note = getattr(task, "note_padding", None)
        return batch if note is None else note(batch)
