"""Copy a LightningModule over the same base: a trial's own modules, buffers, metrics and attributes, but the parameters of the original.

What trains in a trial becomes its own once its adapters are there. A copy is a whole module, so that a trial computes what it computes
alone: BatchNorm's statistics, torchmetrics, and lists that steps append to are never those of another trial.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_lora.quantization.formats import format_of
from lightning_lora.strategies.namespaces import twins


def shared_copy(module: LightningModule) -> LightningModule:
    """Return a copy whose parameters are the module's. Packed weights in buffers, datasets and loaders are shared too.

    Raises:
        ValueError: the module holds something that cannot be copied.
    """
    memo: dict[int, Any] = {}
    kept: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    for child in module.modules():
        if format_of(child) is not None:  # a packed base: codes and scales may be buffers or plain attributes
            kept |= {id(value): value for value in (*child._buffers.values(), *vars(child).values()) if not isinstance(value, dict)}
    data = twins(Trainer, LightningDataModule)
    kept |= {id(value): value for value in _values(vars(module).values()) if isinstance(value, (*data, Dataset, DataLoader))}
    memo.update(kept)
    try:
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"sweep: {type(module).__name__} cannot be copied ({reason}), and each trial has a copy over the same base: keep what cannot be"
            " copied out of its attributes, or use the function sweep, which makes each module anew."
        ) from error


def _values(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        yield value
        if isinstance(value, (list, tuple)):
            yield from value
        elif isinstance(value, dict):
            yield from value.values()


def own_what_trains(module: nn.Module, base: nn.Module) -> None:
    """Give a copy its own parameters in place of those of the base that train in it. Those of the base are frozen then."""
    shared = {id(parameter) for parameter in base.parameters()}
    own: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) in shared:
                own.setdefault(id(parameter), nn.Parameter(parameter.detach().clone()))
                child._parameters[name] = own[id(parameter)]  # tied ones stay tied
    for parameter in base.parameters():
        parameter.requires_grad_(False)


def not_shared(module: nn.Module, base: nn.Module) -> list[str]:
    """Return the names of frozen parameters of a copy that are not the base's."""
    shared = {id(parameter) for parameter in base.parameters()}
    return [name for name, p in module.named_parameters() if not p.requires_grad and id(p) not in shared]
