"""What data with labels shares: the labels' names of all rows, the same ids in every split, and the task told of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from typing_extensions import override

from lightning_lora.data.file_data import STAGES, FileDataModule
from lightning_lora.utils.messages import listed


class LabelDataModule(FileDataModule):
    """Rows with labels, which are texts or whole numbers.

    The labels are those of the task. A task that has none yet gets those of the training rows, in alphabetical or numerical order. Whole
    numbers may also be the ids of a task's labels. Arguments are those of `FileDataModule`.

    Attributes:
        label_ids: Label, as text → id.

    Raises:
        ValueError: A row has a label that the task does not have, or none. The message names file and line.
    """

    label_ids: dict[str, int]

    @abstractmethod
    def labels_of(self, record: Any) -> Iterable[Any]:
        """Return the labels of a record."""

    @override
    def prepare_data(self) -> None:
        if self.trainer is not None and self.trainer.world_size > 1:  # this process encodes before `setup`
            self._agree(self.trainer.state.fn or "fit")
        super().prepare_data()

    @override
    def setup(self, stage: str) -> None:
        self._agree(stage)
        super().setup(stage)

    def _agree(self, stage: str) -> None:
        """Tell the task the labels, or take its own."""
        task = self.trainer.lightning_module if self.trainer is not None else None
        if not hasattr(task, "set_labels"):
            raise ValueError(
                f"{type(self).__name__} tells the task its labels, but {type(task).__name__} has no `set_labels`; choose a task with labels"
            )
        self.label_ids = self._ids(task, stage)

    def _ids(self, task: Any, stage: str) -> dict[str, int]:
        split = STAGES[stage][0] if self.sources["train"] is None else "train"
        if split != "predict" and self.sources[split] is not None and not task.labels_given:
            seen = self._seen(split)
            if not (task.labels and all(name.isdecimal() and int(name) < len(task.labels) for name in seen)):
                task.set_labels(seen)
        named = any(name.isdecimal() for name in task.labels)  # then a number is a name: of labels 1 to 3, a 0 is none
        ids = {} if named else {str(i): i for i in range(len(task.labels))}
        return ids | {name: i for i, name in enumerate(task.labels)}

    def _seen(self, split: str) -> list[str]:
        """Return the labels of a split, and of what is taken from it for validation, in their order."""
        if self.streaming:
            raise ValueError("data.streaming reads no row before it is trained on, so it cannot tell the labels; set model.labels")
        splits = [split, *(["val"] if split == "train" and self.share is not None else [])]
        rows = [row for each in splits for row in self._rows(each, self._sources(each))]
        names: dict[str, None] = {}
        for place, row in rows:
            try:
                names |= dict.fromkeys(map(name_of, self.labels_of(self.record_of(row, split))))
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        return sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))

    def id_of(self, label: Any) -> int:
        """Return a label's id.

        Raises:
            ValueError: The task does not have this label.
        """
        name = name_of(label)
        if name not in self.label_ids:
            known = [known for known, i in self.label_ids.items() if known != str(i)] or list(self.label_ids)
            raise ValueError(f"the label {name!r} is none of {listed(known)}; correct the row, or set model.labels to all labels")
        return self.label_ids[name]

    def name_of_id(self, label: int) -> str:
        """Return the name of a label's id."""
        return next(name for name, i in reversed(self.label_ids.items()) if i == label)  # the names come after the ids as text


def name_of(label: Any) -> str:
    """Return a label as text.

    Raises:
        ValueError: It is neither text nor a whole number.
    """
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, (str, int)) or not str(label).strip():
        raise ValueError(f"the label is {label!r:.60}; it must be a text or a whole number")
    return str(label).strip()
