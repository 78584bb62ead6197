"""Parameter groups: only parameters that train, with A and B in separate groups because their learning rates may differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.layers.base import lora_layers

#: Key in a group of B's: how many times A's learning rate the group gets.
RATIO = "lora_plus_ratio"
#: Key in a group whose adapters have a preconditioner: its name.
PRECONDITION = "lora_precondition"
#: Group of B's → the group of which its learning rate is a multiple.
RATE_OF_B = {"lora_B": "lora_A", "lora_B_no_decay": "no_decay"}


def lora_param_groups(model: nn.Module, *, lr: float, weight_decay: float = 0.0, lora_plus_ratio: float = 1.0) -> list[dict[str, Any]]:
    """Return groups for any torch optimizer: ``AdamW(lora_param_groups(model, lr=2e-4, weight_decay=0.01))``.

    Args:
        model: an adapted model; every parameter that requires a gradient is in exactly one group.
        lr: learning rate of A and of everything else that trains.
        weight_decay: for matrices; vectors (biases, norms, VeRA's) get none.
        lora_plus_ratio: λ; B's learning rate is λ times ``lr`` (LoRA+, arXiv:2402.12354, suggests 16). B is the factor that starts at zero;
            for an embedding that is ``lora_A``, for VeRA b. If both start at random or from the weight (``orthogonal``, ``pissa``,
            ``olora``), B is ``lora_B``, as in PEFT. AdaLoRA starts B at random and E, between the two, at zero. The paper's analysis does
            not cover that; B gets λ and E 1, as in PEFT. Schedulers that set every group's rate from one number (OneCycleLR,
            CyclicLR) would undo the ratio. Give them a list, or use :func:`~lightning_lora.apply_lora_plus`, which works with any.

    Returns:
        Groups with ``name``, ``params``, ``lr`` and ``weight_decay``, without empty ones. They match PEFT's ``create_loraplus_optimizer``
        with two exceptions. PEFT gives vectors B's rate too, and both factors of an embedding a fixed rate (1e-6).

    Raises:
        ValueError: nothing in the model trains, the ratio is not a number > 0, or the rate or the decay none ≥ 0.

    Examples:
        >>> groups = lora_param_groups(apply_lora(model), lr=1e-4, weight_decay=0.01, lora_plus_ratio=16)
        >>> optimizer = torch.optim.AdamW(groups)
        >>> sorted({group["lr"] for group in groups})
        [0.0001, 0.0016]
    """
    check_ratio(lora_plus_ratio)
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):  # torch checks its own defaults, and no group's
        if not isinstance(value, Tensor) and (not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf):
            raise ValueError(f"{name}={value!r}: give a finite number ≥ 0, such as {2e-4 if name == 'lr' else 0.01}.")
    zero = {id(factor) for factor in zero_factors(model)}
    of_b = {RATIO: lora_plus_ratio} if lora_plus_ratio != 1 else {}
    groups: dict[str, dict[str, Any]] = {
        "lora_A": {"lr": lr, "weight_decay": weight_decay},
        "lora_B": {"lr": lr * lora_plus_ratio, "weight_decay": weight_decay, **of_b},
        "lora_B_no_decay": {"lr": lr * lora_plus_ratio, "weight_decay": 0.0, **of_b},
        "other": {"lr": lr, "weight_decay": weight_decay},
        "no_decay": {"lr": lr, "weight_decay": 0.0},
    }
    factors = {id(factor) for _, layer in lora_layers(model) for part in layer.by_weight().values() for factor in part.lora_factors()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            vector = parameter.ndim < 2
            if id(parameter) in zero:
                group = "lora_B_no_decay" if vector else "lora_B"
            else:
                group = "no_decay" if vector else "lora_A" if id(parameter) in factors else "other"
            groups[group].setdefault("params", []).append(parameter)
    found = [{"name": name, **group} for name, group in groups.items() if "params" in group]
    if not found:
        raise ValueError(f"{type(model).__name__} has no parameter that trains; call apply_lora(model, config=...) first.")
    return found


def zero_factors(model: nn.Module) -> list[Tensor]:
    """Return the B's of LoRA+: of every adapted layer the factor that starts at zero; of AdaLoRA, where E starts at zero, B."""
    layers = [part for _, layer in lora_layers(model) for part in layer.by_weight().values()]
    return [factors[1] for factors in (layer.lora_factors() for layer in layers) if factors]


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that a wrapper of Fabric's, or of Lightning's manual optimization, shows.

    The wrapper is of a subclass of its class. Attributes that are set on the wrapper, such as ``param_groups``, do not reach it.
    """
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer) and isinstance(optimizer, type(inner)) and type(optimizer) is not type(inner):
        return inner
    return optimizer


def check_ratio(ratio: float) -> None:
    """Raise ValueError if the ratio is not a finite number > 0."""
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 < ratio < math.inf:
        raise ValueError(f"lora_plus_ratio={ratio!r}: give a number > 0, such as 16; 1 means the same rate for A and B.")


@contextmanager
def only_trainable() -> Iterator[None]:
    """Within it, newly constructed optimizers drop frozen parameters from their groups.

    This must happen at construction, before a scheduler reads the groups: schedulers keep one entry per group. A group that
    becomes empty stays. So per-group settings (a list of lambdas, a list of maximal rates) still match the groups.
    """
    original = Optimizer.add_param_group

    def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
        params = param_group["params"]
        params = [params] if not isinstance(params, (list, tuple)) and hasattr(params, "requires_grad") else list(params)
        # torch accepts (name, parameter) pairs too.
        kept = [p for p in params if (p[1] if isinstance(p, tuple) else p).requires_grad]
        # torch requires names in all groups or in none, and it sees no names in an emptied group.
        names: dict[str, list[str]] = {"param_names": []} if not kept and any(isinstance(p, tuple) for p in params) else {}
        original(self, {**param_group, **names, "params": kept})

    Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.add_param_group = original  # type: ignore[method-assign]


def take_over(optimizer: Optimizer, model: nn.Module) -> None:
    """Give an optimizer that was built before LoRA the adapters of the layers that it holds, in place of their frozen weights.

    LightningCLI's ``--optimizer`` is built so, and some modules build theirs in ``__init__``. Each group takes the adapters of its own
    layers, so settings per group and schedulers stay. Nothing is done if it has a state already, if all of its parameters train, or if
    it is not one of torch's: others may keep a list of the parameters elsewhere.
    """
    groups = optimizer.param_groups
    frozen = {id(p) for group in groups for p in group["params"] if not p.requires_grad}
    if not frozen or optimizer.state or not type(optimizer).__module__.startswith("torch.optim."):
        return
    held = {id(p) for group in groups for p in group["params"]}
    layers = [list(layer.named_parameters(prefix=name)) for name, layer in lora_layers(model)]
    for group in groups:
        mine = {id(p) for p in group["params"]} & frozen
        added = [(name, p) for layer in layers if any(id(p) in mine for _, p in layer) for name, p in layer if p.requires_grad]
        added = [(name, p) for name, p in added if id(p) not in held]
        held |= {id(p) for _, p in added}
        kept = [index for index, p in enumerate(group["params"]) if p.requires_grad]
        if "param_names" in group:
            group["param_names"][:] = [group["param_names"][index] for index in kept] + [name for name, _ in added]
        group["params"][:] = [group["params"][index] for index in kept] + [p for _, p in added]  # LBFGS holds this list itself
