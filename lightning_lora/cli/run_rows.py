"""The encoded rows of a run that is not started: its task's tokenizer is loaded, and none of its model's weights."""

from __future__ import annotations

import pydoc
from collections.abc import Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule
from typing_extensions import override

from lightning_lora.cli.lightning_cli import LoRACLI, check_adapters, check_files
from lightning_lora.cli.messages import usage
from lightning_lora.tasks.hf import load_image_processor, load_tokenizer


class RunConfig(LoRACLI):
    """The configuration of a run, without the run.

    Args:
        words: The options, as of ``fit``.
        like: Another configuration, whose parser is taken: making one takes as long as reading the words.

    Raises:
        ValueError: An option or a value is wrong.
    """

    def __init__(self, words: Sequence[str], like: RunConfig | None = None) -> None:
        self.like = like
        super().__init__(list(words), run=False)

    @override
    def setup_parser(self, *args: Any) -> None:
        if self.like is None:
            super().setup_parser(*args)
        else:
            self.parser = self.like.parser
            self.parser.set_defaults(self.defaults)  # which depend on the words

    @override
    def add_arguments_to_parser(self, parser: Any) -> None:
        """Take the arguments of ``fit`` too, which the config of a finished run has."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=Any, default=None)
        parser.add_argument("--weights_only", type=Any, default=None)

    @override
    def _set_seed(self) -> None:
        """Nothing is drawn."""

    @override
    def instantiate_classes(self) -> None:
        """Make neither model nor trainer."""
        check_files(self.config, "fit")
        check_adapters(self.config)

    @property
    def task(self) -> Any:
        """The task's class."""
        return _class(self.config.model.class_path)

    @property
    def model_arguments(self) -> dict[str, Any]:
        """The task's arguments."""
        return vars(self.config.model.get("init_args", Namespace()))

    def rows(self) -> Any:
        """Return the data module, whose ``examples`` are split → rows, as the run would train on them and validate.

        Raises:
            ValueError: The rows cannot be read; the message names file and line.
        """
        data: Any = _made(_class(self.config.data.class_path), self.config.data.get("init_args", Namespace()))
        if getattr(data, "streaming", False):
            raise ValueError("data.streaming=True: a stream has no end, and inspect reads all rows; add --data.streaming false")
        data.trainer = SimpleNamespace(lightning_module=self.stand_in, current_epoch=0, world_size=1)
        data.setup("fit")
        if not hasattr(data, "examples"):
            raise ValueError(f"{type(data).__name__} shows no rows; inspect shows those of the package's data modules")
        return data

    @cached_property
    def stand_in(self) -> Any:
        """What a data module takes from the task: its tokenizer or image processor, and its labels once they are known."""
        model, gguf_file = self.model_arguments.get("model"), self.model_arguments.get("gguf_file")
        if not isinstance(model, str):
            raise ValueError(
                f"{self.task.__name__} names no model whose tokenizer reads the rows; inspect shows runs of the package's tasks"
            )
        images = getattr(self.task, "auto_class", "") == "AutoModelForImageClassification"
        made = {"processor": load_image_processor(model)} if images else {"tokenizer": load_tokenizer(model, gguf_file)}
        labels = self.model_arguments.get("labels")
        task = SimpleNamespace(**made, labels=list(labels or []), labels_given=labels is not None)
        task.set_labels = lambda labels: setattr(task, "labels", [str(label) for label in labels])
        return task


def _class(path: str) -> Any:
    return pydoc.locate(path)


def _made(cls: type, arguments: Namespace) -> LightningDataModule:
    """Return an instance of a class from its arguments as the parser has them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "data", fail_untyped=False)
    with usage():
        return parser.instantiate_classes(Namespace(data=arguments)).data
