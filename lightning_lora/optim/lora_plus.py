"""LoRA+ (arXiv:2402.12354): B learns λ times as fast as A, whoever sets the rates.

A group's B's become a group of their own right behind it, whose rate is λ times the rate before it. Schedulers are the trouble: they
hold lists with one entry a group, and some (OneCycleLR, CyclicLR, a minimal rate) write absolute rates that undo the ratio. So they
never see the groups of B: while one steps, the optimizer shows the user's own groups; what it changed in them is carried over after.
Before every optimizer step the rates are carried over once more, for those who write ``group["lr"]`` by hand.

The alternative, rewriting each scheduler's lists and limits, would have to know every scheduler there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.optim.groups import RATIO, check_ratio, zero_factors

#: In a group that was split off: its rates are ``group[RATIO]`` times those of the group before it.
SPLIT = "lora_plus_split"
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # what torch's schedulers keep in a group


def apply_lora_plus(optimizer: Optimizer, model: nn.Module, ratio: float, *schedulers: Any) -> None:
    """Give the B's that an optimizer holds ``ratio`` times their group's learning rate, under any scheduler.

    ``LoRACallback(lora_plus_ratio=16)`` calls it; in a plain loop call it once the optimizer and its schedulers are built.

    Args:
        optimizer: any; each of its groups that holds B's is split in two, with equal settings but the rate.
        model: an adapted model. B is the factor that starts at zero (an embedding's ``lora_A``); with AdaLoRA, where that is E, it is
            B all the same, as in PEFT, though the paper says nothing of that.
        ratio: λ, > 0; the paper suggests 16. Weight decay is as the optimizer has it: AdamW's grows with the rate.
        schedulers: those that set this optimizer's rates, built before the call; they work on the groups that they were built on.

    Raises:
        ValueError: the ratio is out of range, the optimizer holds no B, or its groups have a ratio already.
    """
    check_ratio(ratio)
    wanted = {id(factor) for factor in zero_factors(model)}
    if any(RATIO in group for group in optimizer.param_groups):
        raise ValueError(f"lora_plus_ratio={ratio!r}: the optimizer's groups have a ratio already; give it once.")
    groups = [part for group in optimizer.param_groups for part in _split(group, wanted, ratio)]
    if len(groups) == len(optimizer.param_groups):
        raise ValueError(f"lora_plus_ratio={ratio!r}: {type(optimizer).__name__} holds no B of an adapter of {type(model).__name__}.")
    optimizer.param_groups = groups
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: _carry_over(optimizer))
    for scheduler in schedulers:
        _hide_groups_of_b(scheduler)


def holds_b(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether an optimizer holds the B of an adapter."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return any(id(factor) in held for factor in zero_factors(model))


def check_kept(optimizer: Optimizer) -> None:
    """Hold groups of :func:`~lightning_lora.optim.lora_param_groups` against the ratio they were made with.

    Raises:
        ValueError: a scheduler set one rate for all groups when it was built.
    """
    groups = {group.get("name"): group for group in optimizer.param_groups if SPLIT not in group}
    a, b = groups.get("lora_A"), groups.get("lora_B")
    if a is None or b is None or RATIO not in b:
        return
    wanted, found = float(a["lr"]) * b[RATIO], float(b["lr"])
    if abs(found - wanted) > 1e-6 * abs(wanted):
        raise ValueError(
            f"lora_plus_ratio={b[RATIO]!r}: a scheduler gave B the rate {found:g} where A has {float(a['lr']):g}. Pass"
            f" LoRACallback(lora_plus_ratio={b[RATIO]!r}) in place of lora_param_groups(lora_plus_ratio=...), or the scheduler a list of"
            " rates, one a group."
        )


def _split(group: dict[str, Any], wanted: set[int], ratio: float) -> list[dict[str, Any]]:
    """The group, and behind it its B's; the group alone if it has none. It stays, even empty: schedulers count on its place."""
    of_b = [id(p) in wanted for p in group["params"]]
    if not any(of_b):
        return [group]
    b = {**group, RATIO: ratio, SPLIT: True}
    if "name" in group:  # names of groups are the keys of Lightning's LearningRateMonitor
        b["name"] = f"{group['name']}_lora_B"
    for key in ("params", "param_names"):
        if key in group:
            b[key] = [entry for entry, is_b in zip(group[key], of_b, strict=True) if is_b]
            group[key] = [entry for entry, is_b in zip(group[key], of_b, strict=True) if not is_b]
    b |= {rate: group[rate] * ratio for rate in _RATES if rate in group}
    return [group, b]


def _pairs(groups: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each group that was split, with its B's. By place, not by reference: loading a state replaces the groups."""
    return ((before, group) for before, group in pairwise(groups) if SPLIT in group)


def _carry_over(optimizer: Optimizer, changed: dict[int, dict[str, Any]] | None = None) -> None:
    """Set the rates of B, and the other settings that a scheduler ``changed`` in a group (momentum)."""
    for group, b in _pairs(optimizer.param_groups):
        b.update((changed or {}).get(id(group), {}))
        for rate in _RATES:
            if rate in group:
                value = group[rate] * b[RATIO]
                if isinstance(b.get(rate), Tensor):
                    b[rate].copy_(value)  # captured graphs read this very tensor
                else:
                    b[rate] = value


@contextmanager
def _users_groups(optimizer: Optimizer) -> Iterator[None]:
    """Within it the optimizer shows the groups that it had before the split."""
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
    """What goes before a scheduler's class. An attribute on the instance would land in the scheduler's state dict."""

    optimizer: Optimizer

    def step(self, *args: Any, **kwargs: Any) -> Any:
        with _users_groups(self.optimizer):
            return super().step(*args, **kwargs)  # type: ignore[misc]


_CLASSES: dict[type, type] = {}


def _hide_groups_of_b(scheduler: Any) -> None:
    cls = type(scheduler)
    if not isinstance(scheduler, _OnUsersGroups):
        _CLASSES.setdefault(cls, type(cls.__name__, (_OnUsersGroups, cls), {"__module__": cls.__module__}))
        scheduler.__class__ = _CLASSES[cls]
