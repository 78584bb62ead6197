"""``verify_lora``: check on a model and a batch of one's own, before a long run, that its adapters train, merge and save as they should.

Every check computes something twice that must be equal. It is measured beside what the adapters change, and may be ``3·√eps`` of the coarsest
dtype that the layers store or compute in: half of its digits. So a layer that is not ``W·x`` is found, and rounding is not.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lora.adapter_io.save_load import load_adapter, save_adapter
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer, kept_parameters, lora_layers
from lightning_lora.model.apply import already_applied, apply_lora, unload_lora
from lightning_lora.model.merge import merge_lora, unmerge_lora
from lightning_lora.model.modes import evaluating, restore_flags
from lightning_lora.model.probe import Probe, outputs_of, tensors_in
from lightning_lora.model.trial_values import given_values, precision, relative, undone
from lightning_lora.utils.names import clean_name

IDENTITY, GRADIENTS, LAYERS = "identity at step 0", "gradients reach every adapter", "each layer: merged equals unmerged"
MODEL, FILES = "the model: merged equals unmerged", "saved and loaded equal"
Status = Literal["passed", "failed", "not run", "not needed"]
Outputs = dict[str, Tensor]
SHOWN = 3  # names in a row


@dataclass(frozen=True)
class Check:
    """One row.

    Attributes:
        name: what was checked.
        status: "passed", "failed", "not run" (``advice`` says why; it counts as not passed), or "not needed" (it does not apply here).
        measured: the largest relative difference, or the number of layers in "gradients reach every adapter"; None if not run.
        tolerance: the largest ``measured`` that passes.
        advice: what to do, or why it was not run; empty if it passed.
    """

    name: str
    status: Status
    measured: float | None = None
    tolerance: float | None = None
    advice: str = ""

    @property
    def ok(self) -> bool:
        """True if it passed or does not apply."""
        return self.status in ("passed", "not needed")


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
        The checks: identity at step 0, gradients, merging of each layer and of the whole, files.

    Raises:
        ValueError: the config does not fit, the model has no adapters or merged ones, or it returns no floating-point tensor.
    """
    there = already_applied(model, config) if config is not None else any(True for _ in lora_layers(model))
    if not there and config is None:
        raise ValueError(f"{type(model).__name__} has no LoRA layers to verify; pass a config, or call apply_lora(model, config=...) first.")
    if there:
        fresh = not any(not layer._starts() for _, layer in lora_layers(model))
        return run_checks(model, batch, loss, fresh=fresh)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    base = _evaluated(model, batch)
    try:
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
        with _disabled(layers):
            alone, again = (_evaluated(model, batch) for _ in range(2))
        start = _evaluated(model, batch)
    if not alone:
        raise ValueError("batch: the model returned no tensor of floating-point numbers; pass a function that returns one.")
    base = alone if base is None else base
    with given_values(model):
        with evaluating(model), _disabled(layers):
            trained_base = _evaluated(model, batch)  # with what trains in full as it is in the comparisons
        each, computed = _each_layer(model, layers, batch)
        eps = precision(model, computed)
        limit = 3 * math.sqrt(eps)
        noise = _worst(again, alone, _zeros(alone), eps)
        random = noise > limit / 10 and (
            f"two equal calls of the model differ by {noise:.1e}: it draws random numbers in evaluation mode that no seed of torch's sets, so"
            " nothing can be compared; make it repeat its outputs"
        )
        rows = [_identity(start, base, eps, fresh, random), _gradients(model, layers, batch, loss), _layerwise(each, limit)]
        rows += [_whole(model, batch, trained_base, eps, limit, random), _files(model)]
    return rows


def _evaluated(model: nn.Module, batch: Probe) -> Outputs:
    with torch.no_grad(), undone(model), evaluating(model):
        return outputs_of(model, batch)


@contextmanager
def _disabled(layers: dict[str, LoRALayer]) -> Iterator[None]:
    """Switch the adapters off. Unlike ``disabled_lora`` it allows what trains in full, which keeps its values here."""
    mine = [layer for layer in layers.values() if not layer.disabled]
    try:
        for layer in mine:
            layer.__dict__["disabled"] = True
        yield
    finally:
        for layer in mine:
            layer.__dict__.pop("disabled", None)


def _row(name: str, measured: float, tolerance: float, advice: str) -> Check:
    passed = measured <= tolerance
    return Check(name, "passed" if passed else "failed", measured, tolerance, "" if passed else advice)


def _identity(start: Outputs, base: Outputs, eps: float, fresh: bool, random: str | bool) -> Check:
    if not fresh:
        return Check(IDENTITY, "not needed", advice="the adapters have values already")
    if random:
        return Check(IDENTITY, "not run", advice=str(random))
    measured = _worst(start, base, _zeros(base), eps)
    advice = "the init changes the outputs before training: use one that starts at zero (init='kaiming'), or start_from to go on from an adapter"
    return _row(IDENTITY, measured, 30 * eps, advice)  # products of strided inputs are summed in another order


def _gradients(model: nn.Module, layers: dict[str, LoRALayer], batch: Probe, loss: Callable[[nn.Module], Tensor] | None) -> Check:
    dead: list[str] = []
    with undone(model):
        model.train()
        with torch.enable_grad():
            value = loss(model) if loss is not None else _mean_square(outputs_of(model, batch))
        if not value.requires_grad:
            return Check(GRADIENTS, "failed", float(len(layers)), 0.0, "the loss depends on no adapter: see whether the forward pass is under no_grad")
        value.backward()  # type: ignore[no-untyped-call]
        for name, layer in layers.items():
            gradients = [p.grad for p in layer.lora_parameters().values() if p.requires_grad]
            finite = all(g is None or bool(g.isfinite().all()) for g in gradients)
            if any(g is None for g in gradients) or not finite or (gradients and not any(bool(g.any()) for g in gradients if g is not None)):
                dead.append(name)
    advice = (
        f"no finite gradient in {_some(dead)}: the loss on this batch does not depend on these layers' calls. Leave them out (exclude_modules),"
        " or, for layers that few rows use, verify with more rows"
    )
    return _row(GRADIENTS, float(len(dead)), 0.0, advice)


def _mean_square(outputs: Outputs) -> Tensor:
    parts = [tensor.float() if tensor.dtype.itemsize < 4 else tensor for tensor in outputs.values() if tensor.requires_grad]
    return sum((t.masked_fill(~t.isfinite(), 0).abs().square().mean() for t in parts), torch.zeros(()))  # type: ignore[return-value]


@torch.no_grad()
def _each_layer(model: nn.Module, layers: dict[str, LoRALayer], batch: Probe) -> tuple[dict[str, float | str], set[torch.dtype]]:
    """Run the model once. Compare each layer, at its first call, with itself merged: name → difference, or why it is not merged."""
    found: dict[str, float | str] = {}
    computed: set[torch.dtype] = set()

    def compare(name: str, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        if name in found:
            return
        found[name] = ""
        here = dict(tensors_in("", output))
        computed.update(tensor.dtype for tensor in here.values())
        if reason := layer.merge_refusal("dequantize"):
            found[name] = reason
            return
        with _disabled({name: layer}):
            base = dict(tensors_in("", layer.forward(*args, **kwargs)))
        layer.merge_weights(quantized="dequantize")
        try:
            merged = dict(tensors_in("", layer.forward(*args, **kwargs)))
        finally:
            layer.unmerge_weights()
        eps = precision(layer, {tensor.dtype for tensor in here.values()})
        found[name] = _worst(merged, here, base, eps)

    hooks = []
    for name, layer in layers.items():
        hooks.append(layer.register_forward_hook(lambda *a, n=name: compare(n, *a), with_kwargs=True))  # type: ignore[misc]
    try:
        with evaluating(model):
            outputs_of(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found, computed


def _layerwise(each: dict[str, float | str], limit: float) -> Check:
    measured = {name: value for name, value in each.items() if isinstance(value, float)}
    refused = {name: value for name, value in each.items() if isinstance(value, str)}
    if not measured:
        why = next(iter(refused.values()), "the forward pass calls no adapted layer")
        return Check(LAYERS, "not run", advice=why)
    wrong = sorted((name for name in measured if not measured[name] <= limit), key=lambda name: -measured[name])
    advice = (
        f"{_some(wrong)}: the forward is not W·x, so merging changes what the adapter does. Exclude these layers (exclude_modules), or train"
        " with merge_on_fit_end=False and serve the adapter unmerged"
    )
    if refused and not wrong:
        return Check(LAYERS, "not run", max(measured.values()), limit, f"{_some(list(refused))}: {next(iter(refused.values()))}")
    return _row(LAYERS, max(measured.values()), limit, advice)


def _whole(model: nn.Module, batch: Probe, base: Outputs, eps: float, limit: float, random: str | bool) -> Check:
    if random:
        return Check(MODEL, "not run", advice=str(random))
    alone = _evaluated(model, batch)
    try:
        merge_lora(model, untie=True, quantized="dequantize")
    except ValueError as error:
        return Check(MODEL, "not run", advice=f"it cannot be merged: {error}")
    try:
        together = _evaluated(model, batch)
    finally:
        unmerge_lora(model)
    advice = (
        "a module reads a layer's weight without calling the layer, so merging changes what the adapter does not: exclude the layers that the"
        " rows above name (exclude_modules), or train with merge_on_fit_end=False"
    )
    return _row(MODEL, _worst(together, alone, base, eps), limit, advice)


def _files(model: nn.Module) -> Check:
    parameters = {name: parameter for name, parameter in kept_parameters(model)}
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    tolerance = 1e-6  # adapters are written in float32
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = save_adapter(model, Path(folder) / "adapter")
            with torch.no_grad():
                for parameter in parameters.values():
                    if parameter.requires_grad:
                        parameter.add_(1)
            load_adapter(model, path)
    except ValueError as error:
        return Check(FILES, "failed", math.inf, tolerance, str(error))
    apart = {name: relative(p.detach(), kept[name], torch.zeros_like(p), 0.0) for name, p in parameters.items()}
    worst = max(apart, key=lambda name: apart[name])
    wrong = sorted((name for name in apart if not apart[name] <= tolerance), key=lambda name: -apart[name])
    advice = f"{_some(wrong)}: not in the adapter's folder as trained; name it in modules_to_save, or keep checkpoints and load these"
    return _row(FILES, apart[worst], tolerance, advice)


def _worst(found: Outputs, wanted: Outputs, base: Outputs, eps: float) -> float:
    if found.keys() != wanted.keys() or base.keys() != wanted.keys():
        return math.inf
    return max((relative(found[name], wanted[name], base[name], eps) for name in wanted), default=0.0)


def _zeros(outputs: Outputs) -> Outputs:
    return {name: torch.zeros_like(tensor) for name, tensor in outputs.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
