"""The command line: ``lightning-lora fit|validate|test|predict`` is LightningCLI, the other commands are plain functions on files.

Scripts can use `LoRACLI` too, as the quickstart does: it is LightningCLI with ready-made defaults, all optional. Any LightningModule or
LightningDataModule works under ``model`` and ``data``, named by its ``class_path``.
"""

from __future__ import annotations

import inspect
import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentError
from safetensors import SafetensorError

from lightning_lora.cli import help as texts
from lightning_lora.cli.help import SWEEP, TOOLS, TRACEBACK, TRAIN, VERIFY
from lightning_lora.cli.messages import nearest, one_line, usage
from lightning_lora.cli.quiet import quiet
from lightning_lora.cli.yaml_files import check_config_files, unique_keys

# Wrong input and failures of the machine raise one of these. Any other error is a fault in the code, and shows its traceback.
FAILURES = (
    *(ArgumentError, ValueError, RuntimeError, OSError, ImportError, MemoryError, OverflowError, EOFError),
    *(pickle.UnpicklingError, SafetensorError),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; the process's own by default.

    Returns:
        The exit code. 0: done. 2: refused (a ValueError), as an option, a path or what is in a file is wrong. 1: the run failed, or
            ``verify`` found a fault. One line on stderr says what was wrong.
        130, 143: stopped by Ctrl-C or SIGTERM. 141: whatever read the output has closed it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = texts.run(argv)
        if code is not None:
            return code
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head`
        return texts.silenced()
    except FAILURES as error:
        if os.environ.get(TRACEBACK):
            raise
        rank = os.environ.get("LOCAL_RANK", "0")  # set in the processes that DDP starts
        sys.stderr.write(
            f"lightning-lora: error: {'' if rank == '0' else f'[rank {rank}] '}{one_line(error)}\n"
        )  # one write: no mixed lines
        return 2 if isinstance(error, (ArgumentError, ValueError)) else 1
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stop:  # after Ctrl-C Lightning raises one without the exit code
        return _interrupted() if isinstance(stop.__context__, KeyboardInterrupt) else int(stop.code or 0)


def lightning_cli() -> type:
    """Return the class that runs ``fit``, ``validate``, ``test`` and ``predict``. Import it here: importing Lightning takes seconds."""
    from lightning_lora.cli.lightning_cli import LoRACLI

    return LoRACLI


def _run(argv: list[str]) -> int:
    command = argv[0]
    if command in TRAIN:
        _train(argv)
    elif command in SWEEP:
        _sweep(argv[1:])
    elif command in VERIFY:
        return _verify(argv[1:])
    elif command in TOOLS:
        _run_tool(command, argv[1:])
    else:
        there = [*TRAIN, *SWEEP, *VERIFY, *TOOLS]
        raise ValueError(f"no command {command!r}; there are {', '.join(there)}{nearest(command, there)}")
    return 0


def _train(argv: list[str]) -> None:
    from lightning_lora.cli import group_help

    group = group_help.group_asked_for(argv)
    if group is not None:
        print(group_help.group_help(group, argv[1:]))
        return
    quiet(argv[0])
    words = ["--help" if word == "--help-all" else word for word in argv if word != "--json"]
    lightning_cli()(args=words, as_json="--json" in argv)


def _sweep(words: list[str]) -> None:
    from lightning_lora.cli.sweep import sweep

    quiet("fit")
    sweep([word for word in words if word != "--json"], as_json="--json" in words)


def _verify(words: list[str]) -> int:
    from lightning_lora.cli.verify import verify

    quiet("fit")
    return verify([word for word in words if word != "--json"], as_json="--json" in words)


def _run_tool(command: str, argv: list[str]) -> None:
    from lightning_lora.cli import commands, group_help, inspect_rows

    words = inspect_rows.run_words(argv) if command == "inspect" else None
    if words is not None:
        inspect_rows.inspect_run(words, "--json" in argv)
        return
    function: Callable[..., Any] = getattr(commands, command)
    parser = group_help.function_parser(function, command, TOOLS[command])
    flags = {f"--{name}" for name, p in inspect.signature(function).parameters.items() if isinstance(p.default, bool)}
    argv = [f"{argument}=true" if argument in flags else argument for argument in argv]  # the parser's booleans require a value
    argv = group_help.positional_first(argv)
    with usage(known=lambda: parser.get_defaults().keys()), unique_keys():
        check_config_files(argv)
        run = group_help.call(function, vars(parser.instantiate_classes(parser.parse_args(argv))))
    run()


def _interrupted() -> int:
    print("lightning-lora: interrupted", file=sys.stderr)
    return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
