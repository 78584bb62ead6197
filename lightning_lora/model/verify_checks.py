"""The checks of ``verify_lora`` on the model itself: where adapters start, which get a gradient, what a merge changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.model.disable import switched_off
from lightning_lora.model.merge import merge_lora, unmerge_lora
from lightning_lora.model.modes import evaluating
from lightning_lora.model.probe import Probe, outputs_of, tensors_in
from lightning_lora.model.trial_values import input_error, precision, relative, undone

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
        advice: what to do, why it was not run, or, if it passed, why so much is allowed; else empty.
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


def evaluated(model: nn.Module, batch: Probe) -> Outputs:
    """Return the outputs in evaluation mode. Change nothing."""
    with torch.no_grad(), undone(model), evaluating(model):
        return outputs_of(model, batch)


def row(name: str, measured: float, tolerance: float, advice: str, note: str = "") -> Check:
    """Return a row that passed, with a note, or failed with what to do."""
    passed = measured <= tolerance
    return Check(name, "passed" if passed else "failed", measured, tolerance, note if passed else advice)


def identity(start: Outputs, base: Outputs, eps: float, fresh: bool, random: str | bool) -> Check:
    """Compare the outputs at the start with the base's. Change nothing."""
    if not fresh:
        return Check(IDENTITY, "not needed", advice="the adapters have values already")
    if random:
        return Check(IDENTITY, "not run", advice=str(random))
    measured = worst_of(start, base, zeros(base), eps)
    advice = (
        "the init changes the outputs before training: use one that starts at zero (init='kaiming'), or start_from to go on from an adapter"
    )
    return row(IDENTITY, measured, 30 * eps, advice)  # products of strided inputs are summed in another order


def gradients(model: nn.Module, layers: dict[str, LoRALayer], batch: Probe, loss: Callable[[nn.Module], Tensor] | None) -> Check:
    """Run the loss and its backward pass in training mode. Count the adapters that no finite gradient reaches."""
    dead: list[str] = []
    infinite: list[str] = []
    with undone(model):
        model.train()
        with torch.enable_grad():
            value = loss(model) if loss is not None else _mean_square(outputs_of(model, batch))
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: it returned {given}; return a tensor of one element.")
        if not value.requires_grad:
            return Check(
                GRADIENTS,
                "failed",
                float(len(layers)),
                0.0,
                "the loss depends on no adapter: see whether the forward pass is under no_grad",
            )
        value.backward()
        for name, layer in layers.items():
            found = [p.grad for p in layer.lora_parameters().values() if p.requires_grad]
            if not all(g is None or bool(g.isfinite().all()) for g in found):
                infinite.append(name)
            elif any(g is None for g in found) or (found and not any(bool(g.any()) for g in found if g is not None)):
                dead.append(name)
    advice = (
        f"no gradient in {some(dead)}: the loss on this batch does not depend on calls of these layers. Leave them out"
        " (exclude_modules), or, for layers that few rows use, verify with more rows"
    )
    if infinite:
        advice = f"NaN or infinity in the gradients of {some(infinite)}: look for it in the outputs and the loss of this batch"
    return row(GRADIENTS, float(len(dead) + len(infinite)), 0.0, advice)


def _mean_square(outputs: Outputs) -> Tensor:
    parts = [tensor.float() if tensor.dtype.itemsize < 4 else tensor for tensor in outputs.values() if tensor.requires_grad]
    return sum((t.masked_fill(~t.isfinite(), 0).abs().square().mean() for t in parts), torch.zeros(()))


@torch.no_grad()
def each_layer(model: nn.Module, layers: dict[str, LoRALayer], batch: Probe) -> tuple[dict[str, float | str], set[torch.dtype]]:
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
        with switched_off([layer]):
            base = dict(tensors_in("", layer.forward(*args, **kwargs)))
        layer.merge_weights(quantized="dequantize")
        try:
            merged = dict(tensors_in("", layer.forward(*args, **kwargs)))
        finally:
            layer.unmerge_weights()
        eps = precision(layer, {tensor.dtype for tensor in here.values()})
        found[name] = worst_of(merged, here, base, max(eps, input_error(layer)))

    hooks = []
    for name, layer in layers.items():
        hooks.append(layer.register_forward_hook(lambda *a, n=name: compare(n, *a), with_kwargs=True))
    try:
        with evaluating(model), torch.compiler.set_stance("force_eager"):  # compiled code passes over hooks that are added later
            outputs_of(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found, computed


def layerwise(each: dict[str, float | str], limit: float, note: str) -> Check:
    """Return the row of :func:`each_layer`."""
    measured = {name: value for name, value in each.items() if isinstance(value, float)}
    refused = {name: value for name, value in each.items() if isinstance(value, str)}
    if not measured:
        why = next(iter(refused.values()), "the forward pass calls no adapted layer")
        return Check(LAYERS, "not run", advice=why)
    wrong = sorted((name for name in measured if not measured[name] <= limit), key=lambda name: -measured[name])
    advice = (
        f"{some(wrong)}: the forward is not W·x, so merging changes what the adapter does. Exclude these layers (exclude_modules), or"
        " train with merge_on_fit_end=False and serve the adapter unmerged"
    )
    if refused and not wrong:
        return Check(LAYERS, "not run", max(measured.values()), limit, f"{some(list(refused))}: {next(iter(refused.values()))}")
    return row(LAYERS, max(measured.values()), limit, advice, note)


def whole(model: nn.Module, batch: Probe, base: Outputs, eps: float, limit: float, random: str | bool, note: str) -> Check:
    """Merge all, compare the outputs, and unmerge."""
    if random:
        return Check(MODEL, "not run", advice=str(random))
    alone = evaluated(model, batch)
    try:
        merge_lora(model, untie=True, quantized="dequantize")
    except ValueError as error:
        return Check(MODEL, "not run", advice=f"it cannot be merged: {error}")
    try:
        together = evaluated(model, batch)
    finally:
        unmerge_lora(model)
    advice = (
        "a module reads a layer's weight without calling the layer, so merging changes what the adapter does not: exclude the layers that"
        " the rows above name (exclude_modules), or train with merge_on_fit_end=False"
    )
    return row(MODEL, worst_of(together, alone, base, eps), limit, advice, note)


def worst_of(found: Outputs, wanted: Outputs, base: Outputs, eps: float) -> float:
    """Return the largest :func:`relative` of an output; infinity if the outputs are others."""
    if found.keys() != wanted.keys() or base.keys() != wanted.keys():
        return math.inf
    return max((relative(found[name], wanted[name], base[name], eps) for name in wanted), default=0.0)


def zeros(outputs: Outputs) -> Outputs:
    """Return zeros of the outputs' shapes."""
    return {name: torch.zeros_like(tensor) for name, tensor in outputs.items()}


def some(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
