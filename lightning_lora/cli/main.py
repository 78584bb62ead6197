"""The command line: ``lightning-lora fit|validate|test|predict`` is LightningCLI, the other commands are plain functions on files.

Scripts can use `LoRACLI` too, as the quickstart does: it is LightningCLI with ready-made defaults, all optional. Any LightningModule or
LightningDataModule works under ``model`` and ``data``, named by its ``class_path``.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Sequence

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser
from safetensors import SafetensorError

from lightning_lora.cli.messages import UsageError, check_not_null, nearest, one_line, usage
from lightning_lora.cli.yaml_files import check_config_files, unique_keys
from lightning_lora.storage.regular_files import WrongPath

TRAIN = {
    "fit": "train an adapter",
    "validate": "evaluate it on the validation data",
    "test": "evaluate it on the test data",
    "predict": "answer prompts, one JSON object per line",
}
TOOLS = {
    "inspect": "print what would be adapted in a model, or what is in an adapter",
    "merge": "write a model with its adapter merged in, as a folder for from_pretrained",
    "generate": "answer one prompt",
}
TRACEBACK = "LIGHTNING_LORA_TRACEBACK"
# Wrong input and failures of the machine raise one of these. Any other error is a fault in the code, and shows its traceback.
FAILURES = (
    *(ArgumentError, ValueError, RuntimeError, OSError, ImportError, MemoryError, OverflowError, EOFError),
    *(pickle.UnpicklingError, SafetensorError),
)
EXAMPLE = """\
model:
  model: HuggingFaceTB/SmolLM2-135M-Instruct  # a hub id or a folder
  learning_rate: 1.0e-3
data:
  train: train.jsonl  # {"prompt": ..., "response": ...} on each line
  val: val.jsonl
lora:
  config: {rank: 8, target_modules: all-linear}
trainer:
  max_epochs: 1"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; the process's own by default.

    Returns:
        The exit code. 0: done. 2: an option or its value is wrong, or a path leads to nothing. 1: the run failed. In both cases one line
        on stderr says what. 130, 143: stopped by Ctrl-C or SIGTERM. 141: whatever read the output has closed it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would report it again as it exits
        return 128 + signal.SIGPIPE
    except FAILURES as error:
        if os.environ.get(TRACEBACK):
            raise
        rank = os.environ.get("LOCAL_RANK", "0")  # set in the processes that DDP starts
        sys.stderr.write(
            f"lightning-lora: error: {'' if rank == '0' else f'[rank {rank}] '}{one_line(error)}\n"
        )  # one write: no mixed lines
        return 2 if isinstance(error, (ArgumentError, UsageError, WrongPath)) else 1
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stop:  # after Ctrl-C Lightning raises one without the exit code
        return _interrupted() if isinstance(stop.__context__, KeyboardInterrupt) else int(stop.code or 0)
    return 0


def lightning_cli() -> type:
    """Return the class that runs ``fit``, ``validate``, ``test`` and ``predict``. Import it here: importing Lightning takes seconds."""
    from lightning_lora.cli.lightning_cli import LoRACLI

    return LoRACLI


def _run(argv: list[str]) -> None:
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        print(_usage())
    elif command in TRAIN:
        lightning_cli()(args=argv)
    elif command in TOOLS:
        _run_tool(command, argv[1:])
    else:
        there = [*TRAIN, *TOOLS]
        raise UsageError(f"no command {command!r}; there are {', '.join(there)}{nearest(command, there)}")


def _run_tool(command: str, argv: list[str]) -> None:
    from lightning_lora.cli import commands

    function = getattr(commands, command)
    argv = [f"{argument}=true" if argument == "--overwrite" else argument for argument in argv]  # the parser's booleans require a value
    parser = ArgumentParser(prog=f"lightning-lora {command}", description=TOOLS[command], exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file with the options.")
    parser.add_function_arguments(function, as_group=False, as_positional=True, sub_configs=True)
    with usage(known=lambda: parser.get_defaults().keys()), unique_keys():
        check_config_files(argv)
        arguments = vars(parser.instantiate_classes(parser.parse_args(argv)))
        arguments.pop("config", None)
        check_not_null(function, arguments)
    function(**arguments)


def _interrupted() -> int:
    print("lightning-lora: interrupted", file=sys.stderr)
    return 128 + signal.SIGINT


def _usage() -> str:
    commands = "\n".join(f"  {name:<9} {what}" for name, what in {**TRAIN, **TOOLS}.items())
    return (
        f"usage: lightning-lora <command> ...\n\nLoRA for PyTorch Lightning.\n\n{commands}\n\n"
        f"`lightning-lora <command> --help` lists a command's options; {TRACEBACK}=1 shows where an error arose.\n"
        "A config file runs the classes and functions that it names: take one only from someone whose code you would run.\n"
        "Exit codes: 0 done, 2 an option or a path is wrong, 1 the run failed, 130 and 143 stopped by Ctrl-C and SIGTERM.\n\n"
        f"An example of run.yaml, for `lightning-lora fit --config run.yaml`:\n\n{EXAMPLE}"
    )


if __name__ == "__main__":
    sys.exit(main())
