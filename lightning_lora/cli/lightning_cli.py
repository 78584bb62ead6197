"""`LoRACLI`: LightningCLI whose defaults are a language model task, instruction data and a `LoRACallback` under ``lora``."""

from __future__ import annotations

import json
import pydoc
import sys
from typing import Any

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_lora.callbacks import LoRACallback
from lightning_lora.strategies.lightning_private import cli_parser, cli_value

COMMANDS = ("fit", "validate", "test", "predict")
CONFIGS_RUN = "A config file runs the classes and functions that it names: take one only from someone whose code you would run."
LOGGER = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "lora"}}


class LoRACLI(LightningCLI):
    """LightningCLI with ``--lora.*``. ``model`` and ``data`` may be any class, named by its ``class_path``.

    A LoRACallback or subclass under ``trainer.callbacks``, such as AdaLoRACallback, replaces the default callback
    and takes the arguments under ``lora``.

    Args:
        args: The command line, a dict, or None for the process's own arguments.
        run: Run the sub-command that ``args`` begins with; otherwise only build ``model``, ``datamodule`` and ``trainer``.

    Raises:
        jsonargparse.ArgumentError: A key or a value is wrong; the message names it.
        ValueError: Such a callback has a config of its own, and ``lora`` is set too.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        set_parsing_settings(import_path_denylist=[])  # enforces the parser's own list of what no value may name, such as os.system
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},  # a second run in the same folder is not an error
            trainer_defaults={"logger": LOGGER},
            seed_everything_default=1,
            parser_kwargs={"exit_on_error": False, **{name: {"exit_on_error": False, "description": CONFIGS_RUN} for name in COMMANDS}},
            args=args,
            run=run,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(LoRACallback, "lora")
        parser.add_argument("--full_finetuning", type=bool, default=False, help="Train every weight, and ignore what is set under lora.")
        # With a default class, its arguments can be set directly under `model:` and `data:`, without class_path and init_args.
        parser.set_defaults(
            {
                "model": {"class_path": "lightning_lora.tasks.CausalLMTask"},
                "data": {"class_path": "lightning_lora.data.InstructionDataModule"},
            }
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # As in LightningCLI, but without its warning that the process has arguments too: a script such as the quickstart has its own.
        self.config = parser.parse_object(args) if isinstance(args, (dict, Namespace)) else parser.parse_args(args)

    @override
    def _parse_ckpt_path(self) -> None:
        """Do nothing. Lightning's takes the model's class and arguments from the checkpoint, which is data, and may be a stranger's."""

    @override
    def before_instantiate_classes(self) -> None:
        config, parser = self.config.get(str(self.subcommand), self.config), cli_parser(self, self.subcommand)
        callbacks = config.get("trainer.callbacks") or []
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            cls = pydoc.locate(callback.class_path)
            if not isinstance(cls, type) or not issubclass(cls, LoRACallback):
                continue
            here = {name: callback.init_args[name] for name in vars(config.lora)}
            if here["config"] is None:
                callback.init_args.update(config.lora)
            elif config.lora not in (parser.get_defaults()["lora"], Namespace(here)):
                raise ValueError(f"trainer.callbacks: {cls.__name__} has a config of its own, and lora is set too; leave one of them out.")
            parser.callback_keys = [key for key in parser.callback_keys if key != "lora"]

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = cli_value(self, "trainer")
        callbacks = config.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            # Lightning's default, the Rich progress bar, prints nothing if the output is piped into a file.
            callbacks.append(TQDMProgressBar(refresh_rate=1 if sys.stderr.isatty() else 10))
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if cli_value(self, "full_finetuning"):
            callbacks = [callback for callback in callbacks if not isinstance(callback, LoRACallback)]
        return super()._instantiate_trainer(config, callbacks)

    def predict(self, **kwargs: Any) -> None:
        """Run the sub-command ``predict`` and print the predictions, one JSON object per line. Lightning would discard them."""
        for batch in self.trainer.predict(**kwargs) or []:
            for row in batch if isinstance(batch, (list, tuple)) else [batch]:
                print(json.dumps(row, ensure_ascii=False, default=str))
