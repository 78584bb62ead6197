"""``initialize_from_data``: compute the start of adapters whose init reads data, from a few batches.

Each batch runs through the model in evaluation mode. Hooks on the adapted layers give their statistics
(:mod:`lightning_lora.inits.statistics`) the layers' inputs and, if needed, the gradients of their outputs. Statistics of all layers at once
may be as large as the model, so layers are read in groups, each with a pass over the batches of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.inits.statistics import Statistics
from lightning_lora.layers.adapting import unadapt
from lightning_lora.layers.awaiting import awaits_data, data_came
from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.layers.filling import fill_factors
from lightning_lora.model.fuse import fuse, unfuse
from lightning_lora.model.ranks import check_resizable, resize, spec_with, with_ranks
from lightning_lora.model.read_data import Step, read_batch, undisturbed, without_marks
from lightning_lora.registry import data_of
from lightning_lora.utils.messages import counted
from lightning_lora.utils.names import adapter_root, clean_name
from lightning_lora.utils.sharding import is_distributed, reshard

HELD = 2**29  # numbers that statistics hold at a time: 2 GiB in fp32


def initialize_from_data(model: nn.Module, batches: Iterable[Any], *, step: Step | None = None) -> nn.Module:
    """Compute the start of adapters with an init that reads data: ``eva``, ``lora_ga``, ``corda``.

    The model runs in evaluation mode, without dropout, and random numbers are as before afterwards. With several processes each calls it,
    with as many batches of its own; all get the same start. If a batch has an ``attention_mask``, padding does not count; with ``eva``
    neither do tokens whose label is -100.

    Args:
        model: an adapted model on the device to compute on, or a LightningModule around one. Nothing may train on it yet.
        batches: at least one, on the model's device. Each is read several times, if the model is large.
        step: takes model and batch, runs the model, and returns the loss, which only ``lora_ga`` reads. Default: call the model with the
            batch (a mapping as keyword arguments, a tuple as positional ones), and take the output's ``loss``, or the output if it is one
            number.

    Returns:
        The same ``model``.

    Raises:
        ValueError: no adapter waits for data; there is no batch; a layer saw too few rows, or NaN; or the layers are merged, on the meta
            device, or split in a way that hides their rows. Nothing is changed then.

    Examples:
        >>> model = apply_lora(model, LoRAConfig(init="eva", rank=4))
        >>> model = initialize_from_data(model, batches)  # before the optimizer is made: EVA may change ranks
        >>> optimizer = torch.optim.AdamW(lora_param_groups(model, lr=2e-4))
    """
    prefix, root = adapter_root(model)
    layers = {clean_name(name): layer for name, layer in lora_layers(root) if awaits_data(layer)}
    batches = _listed(batches)
    if step is not None and not callable(step):
        raise ValueError(f"step={step!r}: give a function of model and batch that returns the loss, or None.")
    _check(model, layers, batches)
    config = next(iter(layers.values())).lora_config
    kind: type[Statistics] = data_of(config.init)
    if kind.decides_ranks(config):
        check_resizable(layers, "set init_options={'rho': 1.0}, or initialize before the model is sharded")
    gathered: dict[str, Statistics] = {}
    with undisturbed(model), without_marks(layers.values()):
        for group in _groups(layers, kind):
            found = {name: kind(layers[name]) for name in group}
            with torch.enable_grad() if kind.gradients else torch.no_grad():
                for batch in batches:
                    read_batch(model, batch, found, step, kind)
            with torch.no_grad():
                _finish(found)
            gathered |= found
        with torch.no_grad():
            ranks = _agreed(kind.ranks(config, gathered))
            factors = {name: each.factors(ranks[name]) for name, each in gathered.items() if ranks[name]}
    _fill(root, prefix, layers, ranks, factors)
    return model


def _listed(batches: Any) -> list[Any]:
    """Return the batches as a list. A mapping or a tensor can be iterated over too, but is one batch."""
    if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
        raise ValueError(f"batches is of type {type(batches).__name__}: give an iterable of batches, such as a DataLoader or [batch].")
    return list(batches)


def _check(model: nn.Module, layers: Mapping[str, LoRALayer], batches: Sequence[Any]) -> None:
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no adapters that wait for data: call apply_lora(model, config) first, with an init that reads data"
            " ('eva', 'lora_ga', 'corda'). Adapters that have their start keep it."
        )
    init = next(iter(layers.values())).lora_config.init
    if not batches:
        raise ValueError(f"batches is empty, and init={init!r} computes A and B from data: give at least one batch.")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name!r} is merged; call unmerge_lora(model) first.")
        if layer.lora_A.is_meta or layer.weight.is_meta:
            raise ValueError(f"{name!r} is on the meta device, where nothing can be computed for init={init!r}: load its weights first.")
        mesh = getattr(layer.weight, "device_mesh", None)
        if getattr(layer, "lora_split", None) is not None or (mesh is not None and "tensor_parallel" in (mesh.mesh_dim_names or ())):
            raise ValueError(f"{name!r} is split by tensor parallelism, which hides its rows from init={init!r}: initialize it before.")


def _groups(layers: Mapping[str, LoRALayer], kind: type[Statistics]) -> Iterator[list[str]]:
    """Yield groups of layers whose statistics fit in memory together, at least one layer each."""
    group: list[str] = []
    held = 0
    for name, layer in layers.items():
        size = kind.numbers(layer)
        if group and held + size > HELD:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def _finish(found: Mapping[str, Statistics]) -> None:
    """Join the processes' statistics, check them, and keep what A and B need."""
    for each in found.values():
        each.reduce()
    problems = [
        f"{name!r}: init={each.layer.lora_config.init!r} {reason}."
        for name, each in found.items()
        if (reason := _why_not(each)) is not None
    ]
    if problems:
        more = f" ({len(problems) - 1} more layers)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    for each in found.values():
        each.condense()


def _why_not(each: Statistics) -> str | None:
    """Return why A and B cannot be computed; None if they can."""
    what = "inputs or gradients" if each.gradients else "inputs"
    if not each.finite:
        return f"met NaN or infinity in its {what}: look for it in the batches, or use bfloat16 instead of float16"
    if not each.rows:
        labels = " or have the label -100" if each.labelled else ""
        loss = ", or step returned no loss" if each.gradients else ""
        return (
            f"saw no row: no batch reached the layer, or all its tokens are padding{labels}{loss}; give batches that use it, or exclude it"
        )
    if each.rows < (least := each.least_rows()):
        return (
            f"saw {counted(each.rows, 'row')} (tokens), and rank={each.layer.rank} needs at least {least}: give more batches, or a lower"
            " rank"
        )
    return None


def _agreed(ranks: dict[str, int]) -> dict[str, int]:
    """Return the first process's ranks: sums may differ by rounding between machines."""
    told = [ranks]
    if is_distributed():
        torch.distributed.broadcast_object_list(told)
    return told[0]


@torch.no_grad()
def _fill(
    root: nn.Module,
    prefix: str,
    layers: Mapping[str, LoRALayer],
    ranks: Mapping[str, int],
    factors: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Write A and B, with other ranks if the data say so, and remove the adapters of layers that got no rank."""
    reshard(root)  # what is written to gathered copies would be lost
    unfuse(root)
    old = {name: layer.rank for name, layer in layers.items()}
    config = next(iter(layers.values())).lora_config
    if old != ranks:
        config = with_ranks(config, prefix, layers, ranks)
    for name, layer in layers.items():
        if not ranks[name]:
            unadapt(layer)
            continue
        if old != ranks:
            resize(layer, spec_with(layer, ranks[name], config))
        fill_factors(layer, *factors[name])
        layer.keep_start()
        data_came(layer)
    fuse(root)
