"""LoRA+ (arXiv:2402.12354): B's learning rate is λ times A's, under any scheduler.

The B's of a group move to a new group directly behind it, one per model. The new group's rate is λ times the rate of the group that it was
split from. Schedulers keep lists with one entry per group. Some (OneCycleLR, CyclicLR, a minimal rate) write absolute rates, which would
undo the ratio.

So schedulers never see the groups of B. During each method of a scheduler the optimizer exposes only the user's own groups. Afterwards the
scheduler's changes are copied to the groups of B. Rates are copied before every optimizer step too, for code that sets
``group["lr"]`` directly.

The alternative is to rewrite each scheduler's lists and limits. It would need code for every scheduler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import getattr_static
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.optim.groups import RATE_OF_B, RATIO, check_ratio, unwrapped, zero_factors
from lightning_lora.optim.state import divides_state

#: Key in a group that was split off: its rates are ``group[RATIO]`` times those of the last group before it that was not split off.
SPLIT = "lora_plus_split"
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # rates that torch's schedulers keep in a group


def apply_lora_plus(optimizer: Optimizer, model: nn.Module, ratio: float, *schedulers: Any) -> None:
    """Give the B's that an optimizer holds ``ratio`` times their group's learning rate, under any scheduler.

    ``LoRACallback(lora_plus_ratio=16)`` calls it. In a plain loop, call it after building the optimizer and its schedulers. Parts of a
    model may have ratios of their own: call it once for each.

    Args:
        optimizer: any; each of its groups that holds B's is split in two, with equal settings except the rate.
        model: an adapted model. B is the factor that starts at zero (an embedding's ``lora_A``). With AdaLoRA, where E starts at zero, B
            gets the ratio all the same, as in PEFT; the paper does not cover that.
        ratio: λ, > 0; the paper suggests 16. Weight decay works as in the optimizer: AdamW's grows with the rate.
        schedulers: those that set this optimizer's rates, built before the call; they keep working on the groups they were built on.

    Raises:
        ValueError: the ratio is out of range, the optimizer holds no B, or a group that holds one has a ratio already. Or the optimizer
            divided its groups among the processes when it was built, so that a split now would have no effect.

    Examples:
        >>> optimizer = torch.optim.AdamW(lora_param_groups(apply_lora(model), lr=1e-4))
        >>> scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
        >>> apply_lora_plus(optimizer, model, 16, scheduler)
    """
    check_ratio(ratio)
    optimizer = unwrapped(optimizer)
    if divides_state(optimizer):
        cls = type(optimizer).__name__
        raise ValueError(
            f"lora_plus_ratio={ratio!r}: {cls} divided its groups among the processes when it was built. Build it from"
            f" lora_param_groups(model, lr=..., lora_plus_ratio={ratio!r}) in place of this."
        )
    wanted = {id(factor) for factor in zero_factors(model)}
    if any(RATIO in group and any(_of(wanted, group)) for group in optimizer.param_groups):
        raise ValueError(f"lora_plus_ratio={ratio!r}: the optimizer's groups have a ratio already; give it once.")
    names = {group.get("name") for group in optimizer.param_groups}
    groups = [part for group in optimizer.param_groups for part in _split(group, wanted, ratio, names)]
    if len(groups) == len(optimizer.param_groups):
        raise ValueError(f"lora_plus_ratio={ratio!r}: {type(optimizer).__name__} holds no B of an adapter of {type(model).__name__}.")
    optimizer.param_groups = groups
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: _carry_over(optimizer))
    for scheduler in schedulers:
        _hide_groups_of_b(scheduler)


def holds_b(optimizer: Optimizer, model: nn.Module) -> bool:
    """True if an optimizer holds the B of an adapter."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return any(id(factor) in held for factor in zero_factors(model))


def check_kept(optimizer: Optimizer) -> None:
    """Check that groups of :func:`~lightning_lora.lora_param_groups` still have the ratio they were made with.

    Raises:
        ValueError: a scheduler set one rate for all groups when it was built.
    """
    groups = {group.get("name"): group for group in optimizer.param_groups if SPLIT not in group}
    for a, b in ((groups.get(name), groups.get(of_b)) for of_b, name in RATE_OF_B.items()):
        if a is None or b is None or RATIO not in b:
            continue
        wanted, found = float(a["lr"]) * b[RATIO], float(b["lr"])
        if abs(found - wanted) > 1e-6 * abs(wanted):
            raise ValueError(
                f"lora_plus_ratio={b[RATIO]!r}: a scheduler gave B the rate {found:g} where A has {float(a['lr']):g}. Pass"
                f" LoRACallback(lora_plus_ratio={b[RATIO]!r}) in place of lora_param_groups(lora_plus_ratio=...), or the scheduler a list"
                " of rates, one per group."
            )


def _of(wanted: set[int], group: dict[str, Any]) -> list[bool]:
    """Return for each parameter of a group whether it is wanted."""
    return [id(p) in wanted for p in group["params"]]


def _split(group: dict[str, Any], wanted: set[int], ratio: float, names: set[str | None]) -> list[dict[str, Any]]:
    """Return the group, then a group of its B's, under a name that no group has; the group alone if it has none.

    The group stays even if it becomes empty: schedulers rely on its position.
    """
    of_b = _of(wanted, group)
    if not any(of_b):
        return [group]
    b = {**group, RATIO: ratio, SPLIT: True}
    if "name" in group:  # names of groups are the keys of Lightning's LearningRateMonitor
        numbers = ("", *(f"_{number}" for number in range(2, len(names) + 3)))
        b["name"] = next(name for name in (f"{group['name']}_lora_B{number}" for number in numbers) if name not in names)
    for key in ("params", "param_names"):
        if key in group:
            b[key] = [entry for entry, is_b in zip(group[key], of_b, strict=True) if is_b]
            group[key] = [entry for entry, is_b in zip(group[key], of_b, strict=True) if not is_b]
    b |= {rate: group[rate] * ratio for rate in _RATES if rate in group}
    return [group, b]


def _pairs(groups: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each group that was split, with the group of its B's.

    Matched by position, not by reference: loading a state replaces the groups.
    """
    whole: dict[str, Any] = {}
    for group in groups:
        if SPLIT in group:
            yield whole, group
        else:
            whole = group


def _carry_over(optimizer: Optimizer, changed: dict[int, dict[str, Any]] | None = None) -> None:
    """Set the rates of the groups of B, and copy other settings that a scheduler ``changed`` in a group (momentum)."""
    for group, b in _pairs(optimizer.param_groups):
        b.update((changed or {}).get(id(group), {}))
        for rate in _RATES:
            if rate in group:
                value = group[rate] * b[RATIO]
                if isinstance(b.get(rate), Tensor):
                    b[rate].copy_(value)  # captured CUDA graphs read this tensor object
                else:
                    b[rate] = value


@contextmanager
def _users_groups(optimizer: Optimizer) -> Iterator[None]:
    """Within it, the optimizer exposes the groups that it had before the split."""
    groups = optimizer.param_groups
    shown = [group for group in groups if SPLIT not in group]
    before = [dict(group) for group in shown]
    optimizer.param_groups = shown
    try:
        yield
    finally:
        optimizer.param_groups = groups
    same = ("params", "param_names", "name", *_RATES)
    changed = {
        id(group): {key: value for key, value in group.items() if key not in same and value is not old.get(key)}
        for group, old in zip(shown, before, strict=True)
    }
    _carry_over(optimizer, changed)


class _OnUsersGroups:
    """Mark a scheduler's class whose methods see the user's groups only. A mark on the instance would be in its state dict."""


_CLASSES: dict[type, type] = {}


def _hide_groups_of_b(scheduler: Any) -> None:
    cls = type(scheduler)
    if isinstance(scheduler, _OnUsersGroups):
        return
    if cls not in _CLASSES:
        # Some set rates in other methods than `step`, as timm's do in `step_update`.
        methods = {name: getattr_static(cls, name) for name in dir(cls) if not name.startswith("_")}
        hidden = {name: _on_users_groups(method) for name, method in methods.items() if isinstance(method, FunctionType)}
        _CLASSES[cls] = type(cls.__name__, (_OnUsersGroups, cls), {"__module__": cls.__module__, **hidden})
    scheduler.__class__ = _CLASSES[cls]


def _on_users_groups(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _users_groups(unwrapped(self.optimizer)):
            return method(self, *args, **kwargs)

    return wrapped
