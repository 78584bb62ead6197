"""The plain functions that merge a model's adapters into its weights and take them out again, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.layers.state import AdapterState, Quantized
from lightning_lora.model.ties import join, tied_weights, untying
from lightning_lora.utils.sharding import is_distributed, reshard


def merge_lora(
    model: nn.Module,
    *,
    untie: bool = False,
    reversible: bool = True,
    device: torch.device | str | None = None,
    quantized: Quantized | None = None,
) -> nn.Module:
    """Add every update to its base weight: no cost at inference, and a state dict with the base's keys only.

    Sums are taken in fp32 and rounded once. ``merge_report`` tells what the rounding lost. Merging twice changes nothing.

    Args:
        model: an adapted model.
        untie: give an adapted layer whose weight another module shares (tied embeddings) a weight of its own. Other ties stay.
        reversible: keep what :func:`unmerge_lora` needs (a few percent of the weights' bytes).
        device: where to compute, layer by layer (default: where each weight is).
        quantized: how to merge into a quantized weight, which has no default. ``"dequantize"``: the layer becomes a plain one with a
            weight in the dtype it was quantized from, and only the rounding to that is lost. ``"requantize"``: it stays packed, and the
            update is rounded to the grid of a few bits, which loses more than most updates are worth; look at ``merge_report``.
            Either way the packed weight is kept for :func:`unmerge_lora`, unless ``reversible`` is False.

    Returns:
        The same ``model``.

    Raises:
        ValueError: an adapter holds NaN or infinity, a weight is quantized and ``quantized`` does not say how to merge into it, or one
            is tied and ``untie`` is False or no file could hold the model untied; nothing is merged then.
    """
    layers = [(name, layer) for name, layer in lora_layers(model) if not layer.merged]
    for name, layer in layers:
        reason = layer.merge_refusal(quantized)
        if reason:
            raise ValueError(f"{name!r} cannot be merged: {reason}.")
    tied = tied_weights(model)
    if tied and not untie:
        name, others = next(iter(tied.items()))
        raise ValueError(
            f"{name} is tied to {', '.join(others)}: merging would change that too. Pass untie=True to give it a weight"
            " of its own (that tie is no longer declared by the model then, so it is saved and loaded untied), or leave it unmerged."
        )
    plan = untying(model, tied) if tied else None
    untied: list[LoRALayer] = []
    for name, layer in _ready(model, layers):
        shared = [part for weight, part in layer.by_weight().items() if join(name, weight) in tied]
        for part in shared:
            part.lora_state.shares_weight = True
        untied += [layer] if shared else []
        layer.merge_weights(device=device, reversible=reversible, quantized=quantized)
    if plan is not None:
        plan.apply()
    for layer in untied if reversible else ():
        layer.lora_state.untying = plan
    return model


def merge_report(model: nn.Module) -> dict[str, float]:
    """FQN → share of the update that rounding lost in the merge, ‖merged − base − Δ‖ / ‖Δ‖, for every merged layer.

    Of a quantized base it is measured against the unpacked weight; 1 and more means that nothing of the update is left to rely on.
    """
    losses = {name: layer.merge_loss for name, layer in lora_layers(model)}
    return {name: loss for name, loss in losses.items() if loss is not None}


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Take every update out again; the base weights are bit for bit what they were.

    Raises:
        ValueError: a layer cannot go back (its way back was not kept, or its adapter changed); the message names it.
    """
    done: list[tuple[LoRALayer, AdapterState]] = []
    for name, layer in _ready(model, [(name, layer) for name, layer in lora_layers(model) if layer.merged]):
        before = layer.lora_state.copy()
        try:
            layer.unmerge_weights()
        except ValueError as error:
            for earlier, state in done:
                earlier.merge_again(state)
            raise ValueError(f"{name!r} cannot be unmerged: {error}.") from error
        done.append((layer, before))
    return model


def unmerge_for_now(model: nn.Module) -> Callable[[], None]:
    """Unmerge; the function returned merges again what was merged, as it was.

    Raises:
        ValueError: as :func:`unmerge_lora`.
    """
    merged = [(name, layer) for name, layer in lora_layers(model) if layer.merged]
    states = {layer: layer.lora_state.copy() for _, layer in merged}
    unmerge_lora(model)

    def merge() -> None:
        for _, layer in _ready(model, merged):
            layer.merge_again(states[layer])

    return merge


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """Within it the model is unmerged; after it, what was merged is so again.

    Raises:
        ValueError: as :func:`unmerge_lora`.
    """
    merge = unmerge_for_now(model)
    try:
        yield
    finally:
        merge()


def _ready(model: nn.Module, layers: list[tuple[str, LoRALayer]]) -> Iterator[tuple[str, LoRALayer]]:
    """The layers, each at a time when its weight may be written to."""
    if not is_distributed():
        yield from layers
        return
    from lightning_lora.model import parallel

    reshard(model)
    for batch in parallel.summoned(model, layers):
        yield from batch
