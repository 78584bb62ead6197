"""Run a model on a batch before and after a merge, and compare its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import lora_layers
from lightning_lora.model.merge import merge_lora, unmerge_lora, unmerged
from lightning_lora.model.modes import evaluating
from lightning_lora.utils.sharding import full_tensor

#: A batch (a tensor, a tuple of positional or a mapping of keyword arguments), or a function of the model that returns its outputs.
Probe = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | Callable[[nn.Module], Any]


@dataclass(frozen=True)
class OutputDifference:
    """How far an output of the merged model is from the unmerged model's, with the adapter active and in the same dtype.

    Attributes:
        max_abs: largest difference of an entry.
        max_relative: the same, divided by the largest absolute value of the unmerged output.
        mean_relative: mean difference, divided by the mean absolute value of the unmerged output.
    """

    max_abs: float
    max_relative: float
    mean_relative: float


@torch.no_grad()
def probe_merge(model: nn.Module, probe: Probe) -> dict[str, OutputDifference]:
    """Compare the outputs of a model before and after the merge of its adapters. The model is the same afterwards, to the bit.

    The model runs twice in evaluation mode, with the same random numbers. A merged model is unmerged in between and merged again; any
    other is merged and unmerged. Quantized weights are merged by dequantizing.

    Args:
        model: an adapted model, merged or not. On a sharded model every rank calls this; each compares its own outputs.
        probe: a batch for the model, or a function of the model that returns its outputs.

    Returns:
        Name of an output → difference. A nested output has its path as its name (``logits``, ``hidden_states.3``); the name of a single
        tensor is ``output``.

    Raises:
        ValueError: the model cannot be merged or unmerged, it returns no floating-point tensor, or outputs are not comparable.
    """
    merged = any(layer.merged for _, layer in lora_layers(model))
    with evaluating(model):
        first = outputs_of(model, probe)
        with unmerged(model) if merged else _merged(model):
            second = outputs_of(model, probe)
    before, after = (second, first) if merged else (first, second)
    if before.keys() != after.keys():
        raise ValueError(f"probe: the outputs are {sorted(before)} unmerged and {sorted(after)} merged.")
    if not before:
        raise ValueError("probe: the model returned no tensor of floating-point numbers; pass a function that returns one.")
    return {name: _difference(name, before[name], after[name]) for name in before}


@contextmanager
def _merged(model: nn.Module) -> Iterator[None]:
    """Merge the model inside the ``with`` block."""
    merge_lora(model, untie=True, quantized="dequantize")
    try:
        yield
    finally:
        unmerge_lora(model)


def outputs_of(model: nn.Module, probe: Probe) -> dict[str, Tensor]:
    """Return path → a copy of every floating-point tensor that a model returns, with the same random numbers in every call."""
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    if isinstance(probe, str) or not (isinstance(probe, (Tensor, Mapping, tuple, list)) or callable(probe)):
        raise ValueError(f"batch={probe!r}: pass a tensor, a tuple, a mapping, or a function of the model.")
    probe = _copied(probe)  # a model may change its input in place
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(0)
        try:
            if isinstance(probe, Mapping):
                output = model(**probe)
            elif isinstance(probe, (tuple, list)):
                output = model(*probe)
            else:
                output = model(probe) if isinstance(probe, Tensor) else probe(model)
        except NotImplementedError as error:  # torch's, of a module without forward, as many LightningModules are
            if 'missing the required "forward"' not in str(error):
                raise
            raise ValueError(f"batch: {error}. Pass a function in its place, such as lambda model: model.backbone(x).") from error
    return {name or "output": full_tensor(tensor).clone() for name, tensor in tensors_in("", output)}


def _copied(value: Any) -> Any:
    """Return a batch with copies of its tensors; a function as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    return tuple(map(_copied, value)) if type(value) in (tuple, list) else value


def tensors_in(name: str, output: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield path and value of every floating-point tensor in a nested output."""
    if isinstance(output, Tensor):
        if output.is_floating_point() or output.is_complex():
            yield name, output
        return
    items: Any = ()
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, (tuple, list)):
        items = enumerate(output)
    elif is_dataclass(output):
        items = ((field.name, getattr(output, field.name)) for field in fields(output))
    for key, value in items:
        yield from tensors_in(f"{name}.{key}" if name else str(key), value)


def _difference(name: str, before: Tensor, after: Tensor) -> OutputDifference:
    if before.shape != after.shape:
        raise ValueError(f"probe: the output {name!r} has shape {tuple(before.shape)} unmerged and {tuple(after.shape)} merged.")
    wide = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(wide), after.to(wide)
    same = before == after  # masks of -inf among them
    if not (same | (before.isfinite() & after.isfinite())).all():
        raise ValueError(f"probe: the output {name!r} holds NaN or infinity; give the model a batch that it has finite outputs for.")
    size, difference = before.abs()[before.isfinite()], (after - before).abs().masked_fill(same, 0)
    if not size.numel():
        return OutputDifference(0.0, 0.0, 0.0)
    largest, mean = float(difference.max()), float(difference.mean())
    return OutputDifference(largest, _ratio(largest, float(size.max())), _ratio(mean, float(size.mean())))


def _ratio(difference: float, size: float) -> float:
    """Return the difference itself if all of the unmerged output is 0, where a relative one does not exist."""
    return difference / size if size > 0 else difference
