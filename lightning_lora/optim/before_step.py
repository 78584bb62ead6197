"""Change gradients right before an optimizer's step, whatever calls the step.

A hook before ``optimizer.step`` is too early where the step gets a closure: Lightning computes and clips the gradients in it. So the change
is made behind the closure if there is one. It sees accumulated, unscaled and clipped gradients. A step that a GradScaler skips makes none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle


def before_step(optimizer: Optimizer, change: Callable[[], None]) -> RemovableHandle:
    """Call a function before each step of an optimizer, with the gradients that the step will use.

    Args:
        optimizer: of torch or derived from torch's ``Optimizer``; one around another one too.
        change: changes gradients in place. Two functions are called in the order of their registration.

    Raises:
        ValueError: the optimizer calls no hooks, or evaluates its closure as a function of the parameters.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise ValueError(f"{name} searches along gradients of the loss, which must not be changed: use another optimizer.")
    if not getattr(type(optimizer).step, "hooked", False):  # torch's mark
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            raise ValueError(f"{name} calls none of torch's hooks before its step: use an optimizer derived from torch.optim.Optimizer.")
        return before_step(inner, change)

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            change()
            return None

        def closed() -> Any:
            loss = closure()
            change()
            return loss

        return ((args[0], closed, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": closed})

    return optimizer.register_step_pre_hook(hook)
