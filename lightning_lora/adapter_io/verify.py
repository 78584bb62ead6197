"""``verify_lora``: check on a model and a batch of one's own, before a long run, that its adapters train, merge and save as they should.

Every check computes something twice that must be equal. The difference is measured beside what the adapters change, and may be ``3·√eps``
of the coarsest dtype that the layers store or compute in: half of its digits. So a layer that is not ``W·x`` is found, and rounding is not.
Of a base that rounds its inputs too (int8, and FP8 where the GPU multiplies in it), that rounding is the coarsest.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapter_io.save_load import load_adapter, save_adapter
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import kept_parameters, lora_layers
from lightning_lora.layers.mergeable import PREFIX
from lightning_lora.model.apply import already_applied, apply_lora, prepare_quantized, unload_lora
from lightning_lora.model.disable import switched_off
from lightning_lora.model.modes import evaluating, restore_flags
from lightning_lora.model.plain_copy import plain_copy
from lightning_lora.model.probe import Probe
from lightning_lora.model.trial_values import given_values, input_error, precision, relative, undone
from lightning_lora.model.verify_checks import (
    FILES,
    Check,
    Outputs,
    each_layer,
    evaluated,
    gradients,
    identity,
    layerwise,
    row,
    some,
    whole,
    worst_of,
    zeros,
)
from lightning_lora.utils.names import adapter_root, clean_name

LOOSEST = 0.4  # a layer that is not W·x is off by more


def verify_lora(
    model: nn.Module, config: LoRAConfig | None = None, *, batch: Probe, loss: Callable[[nn.Module], Tensor] | None = None
) -> list[Check]:
    """Check a model's adapters on one batch. The model is the same afterwards, to the bit.

    The adapters get random values for the checks, and the model runs in evaluation mode, except for the gradients. Besides the model
    itself, memory is needed for gradients and twice the outputs.

    Args:
        model: a model that ``config`` is applied to during the checks, or one with adapters, which are not merged.
        config: which modules to adapt, and how; None for a model that has adapters.
        batch: what to run the model on: a tensor, a tuple of arguments, a mapping of keyword arguments, or a function of the model.
        loss: returns the loss, a scalar, of the model; default: the mean square of all outputs.

    Returns:
        The checks of identity at step 0, gradients, merging of each layer and of the whole, files.

    Raises:
        ValueError: the config does not fit, the model has no adapters or merged ones, or it returns no floating-point tensor.

    Examples:
        >>> checks = verify_lora(model, LoRAConfig(target_modules="all-linear"), batch=batch)
        >>> {check.status for check in checks}
        {'passed'}
    """
    there = already_applied(model, config) if config is not None else any(True for _ in lora_layers(model))
    if not there and config is None:
        raise ValueError(
            f"{type(model).__name__} has no LoRA layers to verify; pass a config, or call apply_lora(model, config=...) first."
        )
    if there:
        fresh = not any(not layer._starts() for _, layer in lora_layers(model))
        return run_checks(model, batch, loss, fresh=fresh)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    prepare_quantized(model)  # before the first pass, in which bitsandbytes would rewrite 4-bit weights for inference on a CPU
    try:
        evaluated(model, batch)  # some modules keep something of their first batch
        base = evaluated(model, batch)
        with undone(model):
            apply_lora(model, config)
        return run_checks(model, batch, loss, fresh=True, base=base)
    finally:
        unload_lora(model)
        restore_flags(flags)


def run_checks(
    model: nn.Module, batch: Probe, loss: Callable[[nn.Module], Tensor] | None, *, fresh: bool, base: Outputs | None = None
) -> list[Check]:
    """Check a model that has adapters.

    Args:
        model: as in :func:`verify_lora`.
        batch: likewise.
        loss: likewise.
        fresh: the adapters should do nothing yet.
        base: the outputs before they were added; default: those with the adapters switched off.

    Raises:
        ValueError: an adapter is merged, or the model returns no floating-point tensor.
    """
    layers = {clean_name(name): layer for name, layer in lora_layers(model)}
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"{merged[0]!r} is merged, and its adapter cannot be verified; call unmerge_lora(model) first.")
    with undone(model), evaluating(model):
        with switched_off(layers.values()):
            alone, again = (evaluated(model, batch) for _ in range(2))
        start = evaluated(model, batch)
    if not alone:
        raise ValueError("batch: the model returned no tensor of floating-point numbers; pass a function that returns one.")
    base = alone if base is None else base
    with given_values(model):
        with evaluating(model), switched_off(layers.values()):
            trained_base = evaluated(model, batch)  # with what trains in full as it is in the comparisons
        each, computed = each_layer(model, layers, batch)
        eps, coarse = precision(model, computed), input_error(model)
        noise = worst_of(again, alone, zeros(alone), eps)
        random = noise > 0.3 * math.sqrt(eps) and (
            f"two equal calls of the model differ by {noise:.1e}: in evaluation mode it draws random numbers that no seed of torch's sets,"
            " or keeps something from call to call that is no buffer, so nothing can be compared; make it repeat its outputs"
        )
        merging = max(eps, coarse)
        limit = min(3 * math.sqrt(merging), LOOSEST)
        note = coarse and f"the base quantizes its inputs too, and a merged weight does not, so {limit:.2g} is allowed"
        rows = [identity(start, base, eps, fresh, random), gradients(model, layers, batch, loss), layerwise(each, limit, note or "")]
        rows += [whole(model, batch, trained_base, merging, limit, random, note or ""), _files(model)]
    return rows


def _files(model: nn.Module) -> Check:
    """Save the adapter, load it on the base, and compare all that trains, by ΔW where a file holds the adapter in another form."""
    _, root = adapter_root(model)
    tolerance, fresh = 1e-6, dict[int, nn.Parameter]()  # adapters are written in float32

    def on_its_own(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if not parameter.requires_grad:
            return parameter
        return fresh.setdefault(id(parameter), nn.Parameter(parameter.detach() + 1, requires_grad=False))

    base, _ = plain_copy(root, on_its_own)
    try:
        with tempfile.TemporaryDirectory() as folder:
            load_adapter(base, save_adapter(model, Path(folder) / "adapter"))
    except ValueError as error:
        return Check(FILES, "failed", math.inf, tolerance, str(error))
    wanted, found = _what_trains(root), _what_trains(base)
    for name, layer in lora_layers(base):
        if _form(layer) != _form(root.get_submodule(name)):
            for each, side in ((wanted, root.get_submodule(name)), (found, layer)):
                for key in [key for key in each if key.startswith(f"{name}.{PREFIX}")]:
                    del each[key]
                each |= {f"{name}.{part} (ΔW)": single.lora_delta().detach() for part, single in side.by_weight().items()}  # type: ignore[operator]
    apart = {name: relative(found[name], t, torch.zeros_like(t), 0.0) if name in found else math.inf for name, t in wanted.items()}
    wrong = sorted((name for name in apart if not apart[name] <= tolerance), key=lambda name: -apart[name])
    advice = f"{some(wrong)}: not in the adapter's folder as trained; name it in modules_to_save, or keep checkpoints and load these"
    return row(FILES, max(apart.values()), tolerance, advice)


def _what_trains(model: nn.Module) -> dict[str, Tensor]:
    return {clean_name(name): parameter.detach() for name, parameter in kept_parameters(model) if parameter.requires_grad}


def _form(layer: Any) -> tuple[Any, ...]:
    return tuple((name, p.shape) for name, p in layer.lora_parameters().items()), layer.scaling, layer.lora_config.variant
