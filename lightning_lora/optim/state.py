"""Saves and loads optimizer state by parameter name.

torch numbers parameters by their position in the optimizer, and sharded strategies by their position in the model. So a state
saved under one cannot be loaded under another. Names are the same everywhere.

An optimizer around another one (Lookahead) may return a state of its own form, whose numbers only it understands. That is kept as it
is, beside the names of the parameters in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.optim.groups import PRECONDITION, RATIO
from lightning_lora.utils.messages import counted
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.sharding import distribute_like, full_tensor, is_sharded
from lightning_lora.utils.values import nonfinite

#: Key of a state that is not of torch's form.
AS_IS = "as_is"


def state_by_name(optimizer: Optimizer, model: nn.Module, saved: Callable[[Tensor], Tensor] = full_tensor) -> dict[str, Any]:
    """Return ``optimizer.state_dict()`` with names instead of numbers: ``{"state": {fqn: …}, "param_groups": [{"params": [fqn, …], …}]}``.

    Args:
        optimizer: holds parameters of ``model``.
        model: the model whose names are used.
        saved: converts each tensor for saving; by default to its full tensor, whatever shard this rank has.

    Returns:
        The state; ``{"as_is": …, "params": [[fqn, …], …]}`` if it is not of torch's form. Where each process has the state of some
        parameters (``ZeroRedundancyOptimizer``), the first one gets all of it and the others get ``{}``, as in Lightning: every process
        must call this.
    """
    names = _names(optimizer, model)
    if divides_state(optimizer):
        optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]
        state = optimizer.state_dict() if optimizer.rank == 0 else {}  # type: ignore[attr-defined]
    else:
        state = optimizer.state_dict()
    if not state:  # also that of Lightning's stand-in for a run without an optimizer
        return state
    if not _is_torchs(state):
        return {AS_IS: state, "params": _groups(optimizer, names)}
    return {
        **state,
        "state": {
            names.get(key, key): {slot: saved(value) if isinstance(value, Tensor) else value for slot, value in slots.items()}
            if isinstance(slots, dict)
            else slots
            for key, slots in state["state"].items()  # some optimizers keep more here than what is of a parameter (SPAM's total_step)
        },
        "param_groups": [{**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]],
    }


def load_by_name(optimizer: Optimizer, model: nn.Module, saved: dict[str, Any]) -> None:
    """Load what :func:`state_by_name` returned, regardless of the parameters' order and sharding here.

    Raises:
        ValueError: the optimizer has other groups or other parameters, or this is no optimizer's state; nothing is loaded then.
    """
    if saved == {} and not optimizer.param_groups:
        return
    # An optimizer that divides its state has none to return before it is gathered. The groups are the same on every process.
    now = Optimizer.state_dict(optimizer) if divides_state(optimizer) else optimizer.state_dict()
    own = not _is_torchs(now)
    if own != (isinstance(saved, dict) and AS_IS in saved):
        cls = type(optimizer).__name__
        raise ValueError(f"the checkpoint's optimizer keeps its state in another form than {cls}: resume with the same.")
    if own:
        _load_as_is(optimizer, model, saved)
        return
    if not _is_state(saved):
        raise ValueError("the checkpoint's optimizer_states are not what optimizers save: it was changed by hand, or is damaged.")
    names = _names(optimizer, model)
    numbers = {name: index for index, name in names.items()}
    here, there = now["param_groups"], saved["param_groups"]
    _check_groups(here, there, names)
    # torch matches by position, so keep this optimizer's order.
    groups = [{**theirs, "params": mine["params"]} for mine, theirs in zip(here, there, strict=True)]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[Any, Any] = {}
    for name, slots in saved["state"].items():
        if name not in numbers or not isinstance(slots, dict):
            if name in numbers:
                raise ValueError(f"the checkpoint's optimizer state of {name!r} is of type {type(slots).__name__}, not a mapping.")
            state[name] = slots
            continue
        like = parameters[numbers[name]]
        # Moments have their parameter's shape and are sharded like it; step counts are not.
        moments = {slot: value for slot, value in slots.items() if isinstance(value, Tensor) and value.shape == like.shape}
        state[numbers[name]] = slots | {slot: distribute_like(value, like) for slot, value in moments.items()}
    optimizer.load_state_dict({**saved, "state": state, "param_groups": groups})
    # torch adds settings that a later release has, and takes the saved ones as they are: a step would fail on the first that is not there.
    loaded = zip(here, optimizer.param_groups, strict=True)
    lacking = sorted({name for mine, group in loaded for name in (optimizer.defaults.keys() & mine.keys()) - group.keys()})
    if lacking:
        optimizer.load_state_dict(now)
        raise ValueError(
            f"the checkpoint's optimizer is another than {type(optimizer).__name__}: its groups have no {', '.join(lacking)}. Resume with"
            " the same, or load the adapter (load_adapter) into a new run."
        )


def _check_groups(here: list[dict[str, Any]], there: list[dict[str, Any]], names: dict[int, str]) -> None:
    """Raise ValueError if the checkpoint's groups are not this optimizer's.

    Args:
        here: the groups of its state dict.
        there: the checkpoint's, with names.
        names: number → name of this optimizer's parameters.
    """
    if len(here) != len(there):
        raise ValueError(
            f"the checkpoint's optimizer has {counted(len(there), 'parameter group')}, this one {len(here)}; build it as it was built then"
            " (lora_plus_ratio splits groups too)."
        )
    for i, (mine, theirs) in enumerate(zip(here, there, strict=True)):
        different = sorted({names[index] for index in mine["params"]} ^ set(theirs["params"]))
        if different:
            raise ValueError(
                f"optimizer group {i} differs from the checkpoint's in {counted(len(different), 'parameter')}: {', '.join(different[:4])}."
            )
        if mine.get(RATIO) != theirs.get(RATIO):
            raise ValueError(
                f"lora_plus_ratio is {theirs.get(RATIO, 1)!r} in the checkpoint, {mine.get(RATIO, 1)!r} here; resume with the same, or load"
                " the adapter (load_adapter) into a new run."
            )
        if mine.get(PRECONDITION) != theirs.get(PRECONDITION):
            raise ValueError(
                f"precondition is {theirs.get(PRECONDITION)!r} in the checkpoint, {mine.get(PRECONDITION)!r} here: the optimizer's moments"
                " are of other gradients. Resume with the same, or load the adapter (load_adapter) into a new run."
            )


def _load_as_is(optimizer: Optimizer, model: nn.Module, saved: dict[str, Any]) -> None:
    here, there = _groups(optimizer, _names(optimizer, model)), saved.get("params")
    if here != there:
        raise ValueError(
            f"{type(optimizer).__name__} keeps its state by the parameters' order, and the checkpoint's groups hold others, or in another"
            f" order: {there}, here {here}. Build it as it was built then."
        )
    optimizer.load_state_dict(saved[AS_IS])


def divides_state(optimizer: Optimizer) -> bool:
    """True if each process keeps the state of some parameters only, as under torch's ``ZeroRedundancyOptimizer``."""
    return hasattr(optimizer, "consolidate_state_dict")


def holds_nan(saved: Any) -> list[str]:
    """Return the names of the parameters whose saved state, as :func:`state_by_name` returns it, holds NaN.

    Infinity is left out: a second moment may overflow, and its parameter then no longer trains but stays finite.
    """
    if isinstance(saved, dict) and AS_IS in saved:
        tensors = {str(number): tensor for number, tensor in enumerate(_tensors(saved[AS_IS]))}
        return ["an optimizer that keeps it in a form of its own"] if nonfinite(tensors, infinite=False) else []
    slots = saved["state"].items() if isinstance(saved, dict) and isinstance(saved.get("state"), dict) else ()
    moments = {(key, slot): value for key, each in slots if isinstance(each, dict) for slot, value in each.items()}
    found = nonfinite({key: value for key, value in moments.items() if isinstance(value, Tensor)}, infinite=False)
    return list(dict.fromkeys(str(key) for key, _ in found))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _is_torchs(state: Any) -> bool:
    return isinstance(state.get("param_groups"), list) and isinstance(state.get("state"), dict)


def _is_state(saved: Any) -> bool:
    groups = saved.get("param_groups") if isinstance(saved, dict) and isinstance(saved.get("state"), dict) else None
    return isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(names := group.get("params"), list) and all(isinstance(name, str) for name in names)
        for group in groups
    )


def check_named(optimizer: Optimizer, model: nn.Module) -> None:
    """Check that the optimizer's state can be saved.

    Raises:
        ValueError: it holds a parameter that is not part of the model, and so in no checkpoint; or a sharded one, and its state is of a
            form of its own.
    """
    _names(optimizer, model)
    sharded = any(is_sharded(p) for group in optimizer.param_groups for p in group["params"])
    if sharded and not divides_state(optimizer) and not _is_torchs(optimizer.state_dict()):
        raise ValueError(
            f"{type(optimizer).__name__} keeps its state in a form of its own, in which shards cannot be saved: use the optimizer inside"
            " it alone, or strategy='ddp'."
        )


def _names(optimizer: Optimizer, model: nn.Module) -> dict[int, str]:
    """Return number in the optimizer → name in the model."""
    names = {id(parameter): clean_name(name) for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    unknown = [tuple(parameter.shape) for parameter in parameters if id(parameter) not in names]
    if unknown:
        raise ValueError(
            f"the optimizer holds a parameter of shape {unknown[0]} that is not part of {type(model).__name__}; it could not be resumed,"
            " since no checkpoint would hold it: make it, or the module that has it, an attribute of the LightningModule."
        )
    return {index: names[id(parameter)] for index, parameter in enumerate(parameters)}


def _groups(optimizer: Optimizer, names: dict[int, str]) -> list[list[str]]:
    """Return the names of each group's parameters, in their order."""
    numbers = iter(range(len(names)))
    return [[names[next(numbers)] for _ in group["params"]] for group in optimizer.param_groups]
