"""Processes forked from one server that has imported what tests need: importing torch, Lightning and transformers takes seconds."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

SERVER = mp.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["pytest", "lightning_lora.tasks", "lightning_lora.data", "lightning_lora.cli.lightning_cli", "tests.distributed.wrappers"]
)


def start(function: Callable[..., Any], *args: Any) -> ForkServerProcess:
    """Start a process that runs a module-level function, and ends with the tests at the latest."""
    process = SERVER.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def ended(process: ForkServerProcess, seconds: float = 120.0) -> int:
    """Wait for a process to end. Return its exit code: that of a signal is negative.

    Raises:
        AssertionError: it did not end; it is killed.
    """
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{process} did not end within {seconds:.0f} s")
    return process.exitcode
