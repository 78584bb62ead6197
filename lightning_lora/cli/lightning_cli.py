"""`LoRACLI`: LightningCLI whose defaults are a language model task, instruction data and a `LoRACallback` under ``lora``.

A run has the values that the YAML files and options give. LightningCLI deviates from that in three ways, which are overridden here:
hyperparameters in a checkpoint replace options; one class's defaults stay when another class is named; an abbreviated option is accepted.
"""

from __future__ import annotations

import inspect
import json
import os
import pydoc
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_lora.callbacks import LoRACallback
from lightning_lora.callbacks.companions import add_companions
from lightning_lora.cli.checkpoints import checkpoint_of, take_weights_of_run
from lightning_lora.cli.choice import chosen_data, chosen_task, class_path
from lightning_lora.cli.console import print_json
from lightning_lora.cli.messages import check_groups, check_not_null, check_seed, default_of, one_line, usage
from lightning_lora.cli.run_folder import BeganConfig, StderrProgressBar, no_folder_of_a_failed_start
from lightning_lora.cli.run_results import LOGGER, RunResults, log_under_root, print_report
from lightning_lora.cli.task_file import give_task
from lightning_lora.cli.yaml_files import as_yaml, check_config_files, read_yaml, unique_keys
from lightning_lora.config import LoRAConfig
from lightning_lora.data.file_data import FileDataModule
from lightning_lora.data.reading import READERS
from lightning_lora.layers.spec import check_options
from lightning_lora.quantization.quantizers import quantizer_of
from lightning_lora.strategies.checkpoint_io import DurableCheckpointIO
from lightning_lora.strategies.lightning_private import cli_parser, cli_value, start_method
from lightning_lora.utils.messages import counted

COMMANDS = ("fit", "validate", "test", "predict")
CONFIGS_RUN = "A config file runs the classes and functions that it names: take one only from someone whose code you would run."
SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}  # command → what it reads
# Smallest valid values. Lightning accepts smaller ones silently, or divides by zero. -1 is "no limit" for the first two.
LEAST = {"max_epochs": 1, "max_steps": 1, "accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "gradient_clip_val": 0}
MACHINE = ("accelerator", "devices", "num_nodes", "strategy", "precision")  # what most errors in making a Trainer are about


class LoRACLI(LightningCLI):
    """LightningCLI with ``--lora.*``. ``model`` and ``data`` may be any class, named by its ``class_path``.

    A LoRACallback or subclass under ``trainer.callbacks``, such as AdaLoRACallback, replaces the default callback
    and takes the arguments under ``lora``. With ``ckpt_path``, weights and the state of training come from the checkpoint, but no options.

    Args:
        args: The command line, a dict, or None for the process's own arguments.
        run: Run the sub-command that ``args`` begins with; otherwise only build ``model``, ``datamodule`` and ``trainer``.
        as_json: Print results as JSON.

    Raises:
        ValueError: A key, a value or what is in a file is wrong; the message names it.
    """

    also_known: tuple[str, ...] = ()  # options that were taken from the words before; a misspelt one may be one of them

    def __init__(self, args: ArgsType = None, run: bool = True, as_json: bool = False) -> None:
        self.as_json, self.results = as_json, RunResults()
        set_parsing_settings(import_path_denylist=[])  # enforces the parser's own list of what no value may name, such as os.system
        self.words = sys.argv[1:] if args is None else args if isinstance(args, list) else []
        self.command = self.words[0] if run and self.words and self.words[0] in COMMANDS else None
        self.defaults: dict[str, dict[str, Any]] = {
            "model": {"class_path": class_path(chosen_task(self.words))},
            "data": {"class_path": class_path(chosen_data(self.words))},
            "trainer.logger": LOGGER,
        }
        strict = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=BeganConfig,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},  # a second run in the same folder is not an error
            seed_everything_default=1,
            parser_kwargs={**strict, **{name: {**strict, "description": CONFIGS_RUN} for name in self.subcommands()}},
            auto_configure_optimizers=False,  # `optimizer:` would be built before LoRA, from parameters that LoRA freezes
            args=args,
            run=run,
        )

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return only the sub-command that is run, because each takes time to build."""
        there = LightningCLI.subcommands()
        return {self.command: there[self.command]} if self.command else there

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(LoRACallback, "lora")
        parser.add_argument("--full_finetuning", type=bool, default=False, help="Train every weight, and ignore what is set under lora.")
        parser.set_defaults({**self.defaults, "trainer.enable_model_summary": False})  # the callback reports what trains

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # As in LightningCLI, but without its warning that the process has arguments too: a script such as the quickstart has its own.
        ours = cli_parser(self, self.command)
        with usage(known=lambda: [*_options(ours), *self.also_known]), unique_keys():
            check_config_files(self.words)
            self.config = _parse(parser, args)
            chosen = self.config.get(str(self.command), self.config)
            others = {key: {"class_path": path} for key in self.defaults if (path := self._other_class(chosen, key)) is not None}
            if others:  # the arguments that the user did not set are to be this class's, not those of the class it replaces
                ours.set_defaults(others)
                self.config = _parse(parser, args)
        _check_values(self.config.get(str(self.command), self.config))

    def _other_class(self, config: Namespace, key: str) -> str | None:
        """Return the class under a key; None if it is the default one."""
        path = getattr(config.get(key), "class_path", None)
        return path if path is not None and pydoc.locate(path) is not pydoc.locate(self.defaults[key]["class_path"]) else None

    @override
    def _parse_ckpt_path(self) -> None:
        """Leave the options as they are. Lightning's method would take the model's class from a checkpoint that anyone may have made."""

    @override
    def before_instantiate_classes(self) -> None:
        config, parser = self.config.get(str(self.subcommand), self.config), cli_parser(self, self.subcommand)
        log_under_root(config.trainer)
        take_weights_of_run(config, self.command, self.words)
        callbacks = config.get("trainer.callbacks") or []
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            cls = pydoc.locate(callback.class_path)
            if not isinstance(cls, type) or not issubclass(cls, LoRACallback):
                continue
            usual = parser.get_defaults()["lora"]  # takes 10 ms, so only here
            given = {name: value for name, value in vars(config.lora).items() if name in usual and value != usual[name]}
            for name, value in given.items():
                mine = callback.init_args.get(name)
                if name not in callback.init_args:
                    raise ValueError(f"trainer.callbacks: {cls.__name__} has no argument {name!r}; leave lora.{name} out.")
                if mine not in (default_of(cls, name), value):
                    raise ValueError(
                        f"trainer.callbacks: {cls.__name__} has a {name} of its own, and lora.{name} is set too; leave one out."
                    )
                callback.init_args[name] = value
            parser.callback_keys = [key for key in parser.callback_keys if key != "lora"]

    @override
    def instantiate_classes(self) -> None:
        config = self.config.get(str(self.subcommand), self.config)
        check_files(config, self.command)
        check_adapters(config)
        with usage():
            # Lightning's own dump validates it again.
            self.config_dump = read_yaml(as_yaml(cli_parser(self, self.subcommand), config, links=True))
            super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = cli_value(self, "trainer")
        callbacks = config.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(StderrProgressBar(refresh_rate=1 if sys.stderr.isatty() else 10))
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if cli_value(self, "full_finetuning"):
            callbacks = [callback for callback in callbacks if not isinstance(callback, LoRACallback)]
        if self.command == "fit" and not config["fast_dev_run"]:
            callbacks = [*callbacks, self.results]
        for name, least in LEAST.items():
            value = config[name]
            if value is not None and not value >= least and (value != -1 or name not in ("max_epochs", "max_steps")):
                raise ValueError(f"trainer.{name}={value}: give at least {least}")
        given = {name: config[name] for name in MACHINE if config[name] not in ("auto", None, 1)}
        where = f"trainer ({', '.join(f'{name}={value!r}' for name, value in given.items())}): " if given else "trainer: "
        with usage(MisconfigurationException, TypeError, ImportError, where=where):
            trainer = super()._instantiate_trainer(config, callbacks)
            if start_method(trainer.strategy) is not None:
                raise ValueError("this strategy trains in copies of this process, and what they train is lost; use strategy=ddp")
            cpus = os.cpu_count() or 1
            if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > max(8, 4 * cpus):
                raise ValueError(f"{trainer.num_devices} processes on {counted(cpus, 'CPU')}; give fewer devices")
        add_companions(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # it leaves a part of a checkpoint when the disk is full
            trainer.strategy.checkpoint_io = DurableCheckpointIO()
        return trainer

    def fit(self, **kwargs: Any) -> None:
        """Run the sub-command ``fit``. Print where its results are and what to type next."""
        with redirect_stdout(sys.stderr):  # its tables are no results
            self._run("fit", kwargs)
        if self.trainer.is_global_zero and not cli_value(self, "trainer").fast_dev_run:
            report = self.results.report(self.trainer, self.model, self.datamodule)
            print_json(report) if self.as_json else print_report(report)

    def validate(self, **kwargs: Any) -> None:
        """Run the sub-command ``validate``, which prints the metrics."""
        self._evaluate("validate", kwargs)

    def test(self, **kwargs: Any) -> None:
        """Run the sub-command ``test``, which prints the metrics."""
        self._evaluate("test", kwargs)

    def _evaluate(self, command: str, arguments: dict[str, Any]) -> None:
        if not self.as_json:
            self._run(command, arguments)
            return
        with redirect_stdout(sys.stderr):
            results = self._run(command, arguments | {"verbose": False})
        if self.trainer.is_global_zero:
            print_json({name: value for metrics in results for name, value in metrics.items()})

    def predict(self, **kwargs: Any) -> None:
        """Run the sub-command ``predict`` and print the predictions, one JSON object per line. Nothing else goes to stdout."""
        with redirect_stdout(sys.stderr):
            batches = self._run("predict", kwargs)
        for batch in batches or []:
            for row in batch if isinstance(batch, (list, tuple)) else [batch]:
                print(json.dumps(row, ensure_ascii=False, default=str))

    def _run(self, command: str, arguments: dict[str, Any]) -> Any:
        if arguments.get("weights_only") is None:
            arguments["weights_only"] = True  # Lightning's default runs code that is in the file
        with usage():
            arguments["ckpt_path"] = checkpoint_of(arguments.get("ckpt_path"), command, self.trainer, arguments["weights_only"])
            give_task(self.model, arguments["ckpt_path"], self.trainer)
        with no_folder_of_a_failed_start(self.trainer):
            try:
                return getattr(self.trainer, command)(**arguments)
            except MisconfigurationException as error:
                raise ValueError(one_line(error)) from error


def _parse(parser: LightningArgumentParser, args: ArgsType) -> Namespace:
    return parser.parse_object(args) if isinstance(args, (dict, Namespace)) else parser.parse_args(args)


def _check_values(config: Namespace) -> None:
    """Refuse null where the parser takes it and the class does not."""
    check_groups(config, ("lora", "trainer"))
    for key in ("model", "data"):
        cls = pydoc.locate(getattr(spec := config.get(key), "class_path", None) or "")
        if isinstance(cls, type):
            check_not_null(cls, vars(spec.get("init_args", Namespace())), f"{key}.")
    check_not_null(LoRACallback, vars(config.lora), "lora.")
    check_seed(config.seed_everything)


def check_files(config: Namespace, command: str | None) -> None:
    """Refuse data files that a command reads and that are not named or do not exist, before a model is loaded.

    Raises:
        ValueError: A file is not named, or does not exist.
    """
    files = vars(config.data.get("init_args", Namespace())) if config.get("data") else {}
    splits = SPLITS.get(str(command), ())
    cls = pydoc.locate(getattr(config.get("data"), "class_path", None) or "")
    ours = isinstance(cls, type) and issubclass(cls, FileDataModule)
    if ours and splits and not any(files.get(split) for split in (splits[0], *(["test"] if command == "predict" else []))):
        raise ValueError(f"data.{splits[0]} is not set; {command} needs a file there")
    for split in splits:
        for file in files[split] if isinstance(files.get(split), list) else [files.get(split)]:
            if isinstance(file, str) and Path(file).suffix in READERS and not Path(file).exists():
                raise ValueError(f"data.{split}={file!r}: no such file (seen from {Path.cwd()})")


def check_adapters(config: Namespace) -> None:
    """Refuse adapters whose init, variant, kinds or formats nothing is registered as, before a model is loaded.

    Raises:
        ValueError: A name or an option is not known.
    """
    callbacks = config.trainer.get("callbacks") or []
    named = [callback.get("init_args", Namespace()) for callback in (callbacks if isinstance(callbacks, list) else [callbacks])]
    for lora in (config.lora, *named):
        given = lora.get("config")
        if isinstance(given, Namespace) and "target_modules" in given:
            with usage(where="lora.config: "):
                check_options(LoRAConfig(**{name: value for name, value in given.as_dict().items() if name != "__path__"}))  # of its file
        if lora.get("quantize") is not None:
            with usage(where="lora."):
                quantizer_of(lora["quantize"])


def _options(parser: LightningArgumentParser) -> list[str]:
    """Return all options, as a user writes them."""
    there = [key.replace(".init_args", "") for key in parser.get_defaults().keys(branches=True)]
    return there + [f"lora.config.{name}" for name in inspect.signature(LoRAConfig).parameters]
