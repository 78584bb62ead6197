"""Processes forked from one server that has imported what tests need: importing torch, Lightning and transformers takes seconds."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

SERVER = mp.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "tests",  # first, as in pytest
        "pytest",
        "lightning_lora.tasks",
        "lightning_lora.data",
        "lightning_lora.cli.lightning_cli",
        "tests.distributed.wrappers",
        "transformers.models.llama.modeling_llama",  # a second, in each process that makes a tiny one
    ]
)


def start(function: Callable[..., Any], *args: Any, said: Path | None = None) -> ForkServerProcess:
    """Start a process that runs a module-level function under this one's environment. It ends with this one at the latest.

    Args:
        function: what to run.
        args: its arguments.
        said: file for what the process prints.
    """
    process = SERVER.Process(target=_run, args=(dict(os.environ), said, function, args), daemon=True)
    process.start()
    return process


def _run(environment: dict[str, str], said: Path | None, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    gc.freeze()  # collections of garbage pass over what the server imported
    os.environ.clear()  # the server's is that of its first user
    os.environ.update(environment)
    if said is not None:
        with said.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    function(*args)


def ended(process: ForkServerProcess, seconds: float = 240.0) -> int:
    """Wait for a process to end. Return its exit code: that of a signal is negative.

    Raises:
        AssertionError: it did not end. It is killed.
    """
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{process} did not end within {seconds:.0f} s")
    return process.exitcode


def printed(function: Callable[..., Any], *args: Any, seconds: float = 240.0) -> str:
    """Run a function in a process of its own. Return what it printed.

    Raises:
        AssertionError: it raised, or did not end.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        code = ended(start(function, *args, said=said), seconds)
        assert code == 0, said.read_text()
        return said.read_text()
