"""A pytest plugin that gives every Trainer a ``LoRACallback``: ``pytest -p tests.harness.injected``.

It is for the test suites of others, above all Lightning's own (:mod:`tests.harness.lightning_suite`). Merging is left out where the
Trainer has its callback already.
"""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as pl

from lightning_lora import LoRACallback, LoRAConfig


def _injecting(init: Any) -> Any:
    @functools.wraps(init)  # LightningCLI reads the signature
    def wrapped(self: pl.Trainer, *args: Any, callbacks: Any = None, **kwargs: Any) -> None:
        given = [] if callbacks is None else [callbacks] if isinstance(callbacks, pl.Callback) else list(callbacks)
        if not any(isinstance(callback, LoRACallback) for callback in given):
            given.append(LoRACallback(LoRAConfig(rank=2, alpha=1, target_modules="all-linear"), check_base=False))
        init(self, *args, callbacks=given, **kwargs)

    return wrapped


def pytest_configure() -> None:
    pl.Trainer.__init__ = _injecting(pl.Trainer.__init__)  # type: ignore[method-assign]
