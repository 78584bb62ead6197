"""A pytest plugin that gives every Trainer a ``LoRACallback``: ``pytest -p tests.harness.injected``.

It is for the tests of others, above all Lightning's own (:mod:`tests.harness.lightning_suite`). Adapters start small, so that tests which
train with large steps do not diverge. Tests resume in modules with new random weights, so the base is not checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_lora import LoRACallback, LoRAConfig


def injecting(init: Callable[..., None]) -> Callable[..., None]:
    """Return a Trainer's ``__init__`` that adds the callback, unless it is given one."""

    @functools.wraps(init)  # LightningCLI reads the signature
    def wrapped(self: pl.Trainer, *args: Any, callbacks: Any = None, **kwargs: Any) -> None:
        given = [] if callbacks is None else [callbacks] if isinstance(callbacks, pl.Callback) else list(callbacks)
        if not any(isinstance(callback, LoRACallback) for callback in given):
            given.append(LoRACallback(LoRAConfig(rank=2, alpha=1, target_modules="all-linear"), check_base=False))
        init(self, *args, callbacks=given, **kwargs)

    return wrapped


def pytest_configure() -> None:
    """Replace the Trainer's ``__init__``."""
    pl.Trainer.__init__ = injecting(pl.Trainer.__init__)  # type: ignore[method-assign]
