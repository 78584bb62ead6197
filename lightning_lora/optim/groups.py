"""Parameter groups: only what trains, A and B apart where they get learning rates of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer


def lora_param_groups(model: nn.Module, lr: float, weight_decay: float = 0.0, lora_plus_ratio: float = 1.0) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: ``AdamW(lora_param_groups(model, lr=2e-4, weight_decay=0.01))``.

    Args:
        model: an adapted model; every parameter that requires a gradient ends up in exactly one group.
        lr: learning rate of A and of all else that trains.
        weight_decay: for matrices; vectors (biases, norms) get none.
        lora_plus_ratio: λ, how many times ``lr`` B gets (LoRA+, arXiv:2402.12354, suggests 16).

    Returns:
        Groups with ``name``, ``params``, ``lr`` and ``weight_decay``; empty ones are left out.

    Raises:
        ValueError: nothing in the model trains, or the ratio is not a number > 0.
    """
    if not lora_plus_ratio > 0:
        raise ValueError(f"lora_plus_ratio={lora_plus_ratio!r}: give a number > 0; 1 means the same rate for A and B.")
    groups: dict[str, dict[str, Any]] = {
        "lora_A": {"lr": lr, "weight_decay": weight_decay},
        "lora_B": {"lr": lr * lora_plus_ratio, "weight_decay": weight_decay},
        "other": {"lr": lr, "weight_decay": weight_decay},
        "no_decay": {"lr": lr, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            last = name.rpartition(".")[2]
            group = last if last in ("lora_A", "lora_B") else "other" if parameter.ndim > 1 else "no_decay"
            groups[group].setdefault("params", []).append(parameter)
    found = [{"name": name, **group} for name, group in groups.items() if "params" in group]
    if not found:
        raise ValueError(f"{type(model).__name__} has no parameter that trains; call apply_lora(model, config=...) first.")
    return found


@contextmanager
def only_trainable() -> Iterator[None]:
    """Within it, optimizers that are constructed drop frozen parameters from their groups.

    It has to happen at construction, before a scheduler reads the groups: schedulers keep one entry a group. A group that
    ends up empty stays, so that per-group settings (a list of lambdas, a list of maximal rates) still line up.
    """
    original = Optimizer.add_param_group

    def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
        params = param_group["params"]
        params = [params] if not isinstance(params, (list, tuple)) and hasattr(params, "requires_grad") else list(params)
        # torch accepts (name, parameter) pairs too.
        kept = [p for p in params if (p[1] if isinstance(p, tuple) else p).requires_grad]
        original(self, {**param_group, "params": kept})

    Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.add_param_group = original  # type: ignore[method-assign]
