"""The command line: ``lightning-lora fit|validate|test|predict`` is LightningCLI, the other commands are plain functions on files.

Scripts can use `LoRACLI` too, as the quickstart does: it is LightningCLI with ready-made defaults, all optional. Any LightningModule or
LightningDataModule works under ``model`` and ``data``, named by its ``class_path``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentError, auto_cli

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
        The exit code: 0, or 1 if the input was wrong (one line on stderr says what).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        print(_usage())
        return 0
    try:
        if command in TRAIN:
            lightning_cli()(args=argv)
        elif command in TOOLS:
            _run_tool(command, argv[1:])
        else:
            raise ValueError(f"no command {command!r}; there are {', '.join([*TRAIN, *TOOLS])}")
    except (ArgumentError, ValueError, OSError, ImportError) as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"lightning-lora: error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def lightning_cli() -> type:
    """Return the class that runs ``fit``, ``validate``, ``test`` and ``predict``. Import it here: importing Lightning takes seconds."""
    from lightning_lora.cli.lightning_cli import LoRACLI

    return LoRACLI


def _run_tool(command: str, argv: list[str]) -> None:
    from lightning_lora.cli import commands

    argv = [f"{argument}=true" if argument == "--overwrite" else argument for argument in argv]  # the parser's booleans require a value
    auto_cli(getattr(commands, command), args=argv, prog=f"lightning-lora {command}", exit_on_error=False)


def one_line(error: Exception) -> str:
    """Return an error's message on one line; of the parser's nested messages, the part that says what is wrong."""
    text = str(error)
    lines = [line.strip(" -") for line in text.splitlines()]
    noise = ("Does not validate against", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")
    return " ".join(line for line in lines if line and not line.startswith(noise)) or type(error).__name__


def _usage() -> str:
    commands = "\n".join(f"  {name:<9} {what}" for name, what in {**TRAIN, **TOOLS}.items())
    return (
        f"usage: lightning-lora <command> ...\n\nLoRA for PyTorch Lightning.\n\n{commands}\n\n"
        f"`lightning-lora <command> --help` lists a command's options; {TRACEBACK}=1 shows where an error arose.\n"
        "A config file runs the classes and functions that it names: take one only from someone whose code you would run.\n\n"
        f"An example of run.yaml, for `lightning-lora fit --config run.yaml`:\n\n{EXAMPLE}"
    )


if __name__ == "__main__":
    sys.exit(main())
