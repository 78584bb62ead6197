"""Counting the Python calls that the package makes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

INLINED = {"<listcomp>", "<setcomp>", "<dictcomp>"}  # calls no more from Python 3.12 on


def python_calls(function: Callable[[], object], everywhere: bool = False) -> int:
    """How many functions of the package one call runs, the second time; ``everywhere``: of any package, in this thread."""
    function()
    seen: list[str] = []

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and (everywhere or "/lightning_lora/" in frame.f_code.co_filename) and frame.f_code.co_name not in INLINED:
            seen.append(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(seen)
