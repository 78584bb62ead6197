"""Give adapters values for a check, and take back all that the check changes: values, buffers, gradients, modes, random numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.layers.awaiting import await_data, awaits_data, data_came
from lightning_lora.layers.base import kept_parameters, lora_layers
from lightning_lora.layers.mergeable import PREFIX
from lightning_lora.quantization.formats import format_of
from lightning_lora.utils.sharding import local_tensor

SHARE = 0.3  # size of an update of unit inputs; a base's linear keeps unit inputs near 1
TF32 = 2.0**-10


@contextmanager
def given_values(model: nn.Module) -> Iterator[None]:
    """Give what trains random values within the ``with`` block, so that every adapter has an effect. All is as before after it, to the bit.

    A start other than zero is changed by a tenth. A zero becomes so large that the update is about 0.3 of a layer's output, whatever the
    width. Changes that the block makes to buffers, gradients, modes and torch's and Python's random numbers are undone too.
    """
    parameters = dict(kept_parameters(model))
    kept = {name: local_tensor(p.detach()).clone() for name, p in parameters.items()}
    waiting = [layer for _, layer in lora_layers(model) if awaits_data(layer)]
    with undone(model):
        try:
            for layer in waiting:
                data_came(layer)
            _fill(model, parameters)
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    local_tensor(parameter).copy_(kept[name])
            for layer in waiting:
                await_data(layer)


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Undo what the ``with`` block does to buffers, gradients, modes and random numbers, beside parameters and merges."""
    modes = [(module, module.training) for module in model.modules()]
    owners = [(module, name, b) for module in model.modules() for name, b in module._buffers.items() if b is not None]
    buffers = {id(b): (b, b.detach().clone()) for _, _, b in owners}
    gradients = [(p, p.grad) for p in model.parameters()]
    python, gpus = random.getstate(), range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers.values():
                buffer.copy_(value)
        for module, name, buffer in owners:
            module._buffers[name] = buffer
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _fill(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    units = {id(p): SHARE / math.sqrt(layer.rank) / abs(layer.scaling or 1.0) for _, layer in lora_layers(model) for p in _own(layer)}
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        mine = local_tensor(parameter)
        size = float(mine.float().square().mean().sqrt()) if mine.numel() else 0.0
        adapter = name.rpartition(".")[2].startswith(PREFIX)
        step = units.get(id(parameter), SHARE) if adapter and size < 1e-3 else 0.1 * size
        mine.add_(torch.randn(mine.shape, generator=generator, dtype=torch.float64).to(mine) * step)


def _own(layer: nn.Module) -> list[nn.Parameter]:
    return list(layer.lora_parameters().values()) if getattr(layer, "low_rank", False) else []  # type: ignore[operator]


def precision(model: nn.Module, computed: set[torch.dtype]) -> float:
    """Return the spacing of numbers near 1 in the coarsest dtype that adapted layers store or compute in.

    Args:
        model: an adapted model.
        computed: dtypes of the layers' outputs.
    """
    weights = {p.dtype for _, layer in lora_layers(model) for p in layer.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1}
    eps = max(torch.finfo(dtype).eps for dtype in weights | computed)
    on_gpu = any(p.is_cuda for p in model.parameters())
    return max(eps, TF32) if on_gpu and eps < TF32 and torch.backends.cuda.matmul.allow_tf32 else max(eps, 1e-13)


def input_error(model: nn.Module) -> float:
    """Return the largest error of adapted layers' products from inputs that they quantize, which a merged weight multiplies as they are."""
    formats = ((format_of(layer), layer) for _, layer in lora_layers(model))
    return max((packing.input_error(layer) for packing, layer in formats if packing is not None), default=0.0)


def relative(found: Tensor, wanted: Tensor, base: Tensor, eps: float) -> float:
    """Return the norm of ``found - wanted`` beside the adapters' effect ``wanted - base``, plus √eps of the output's own norm.

    The second term is there because rounding is relative to the output, also where adapters change it little.
    """
    if found.shape != wanted.shape:
        return math.inf
    wide = torch.promote_types(found.dtype, torch.float32)
    found, wanted, base = found.to(wide), wanted.to(wide), base.to(wide)
    size = wanted.masked_fill(~wanted.isfinite(), 0).norm()  # masks of -inf
    error, effect = _norm(found, wanted), _norm(wanted, base) if base.shape == wanted.shape else 0.0
    scale = effect + math.sqrt(eps) * float(size)
    return error / scale if scale > 0 else (0.0 if error == 0 else math.inf)


def _norm(one: Tensor, other: Tensor) -> float:
    """Return the norm of a difference; infinity if it has a NaN or an infinity that only one side has."""
    difference = (one - other).masked_fill(one == other, 0)
    return float(difference.norm()) if difference.isfinite().all() else math.inf
