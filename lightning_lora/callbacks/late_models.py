"""Adapt a module that has no parameters yet, right after the hook that builds them: ``setup`` or ``configure_model``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule

from lightning_lora.strategies import StrategyHooks

HOOKS = ("setup", "configure_model")  # in the order in which Lightning calls them


def when_built(module: LightningModule, adapt: Callable[[], StrategyHooks]) -> Callable[[], None]:
    """Adapt a module once, right after the first hook that leaves it with parameters.

    The hooks are replaced on the instance, and put back before the function is called.

    Args:
        module: a LightningModule without parameters.
        adapt: adapts it. If ``setup`` built it, ``configure_model`` is watched from then on.

    Returns:
        A function that puts the hooks back. It does nothing once they are.
    """
    own: dict[str, Any] = {name: module.__dict__.get(name) for name in HOOKS}

    def put_back() -> None:
        for name in list(own):
            hook = own.pop(name)
            module.__dict__.pop(name, None)
            if hook is not None:
                setattr(module, name, hook)

    def followed(name: str, original: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(original)  # Lightning follows __wrapped__ to see that the user overrode the hook
        def hook(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            if any(True for _ in module.parameters()):
                put_back()
                hooks = adapt()
                if name == "setup":
                    hooks.watch_configure_model()

        return hook

    for name in HOOKS:
        setattr(module, name, followed(name, getattr(module, name)))
    return put_back
