"""The plain functions that merge a model's adapters into its weights and take them out again, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.layers.mergeable import Quantized
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
        untie: give an adapted layer whose weight another module shares (tied embeddings) a weight of its own.
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
            is tied and ``untie`` is False; nothing is merged then.
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
            f"{name}.weight is tied to {', '.join(others)}: merging would change that too. Pass untie=True to give it a weight"
            " of its own (the model's tie_word_embeddings is switched off then), or leave it unmerged."
        )
    configs = _untie_configs(model) if tied else []
    for name, layer in _ready(model, layers):
        if name in tied:
            layer._owns_weight, layer._untied = False, configs
        layer.merge_weights(device=device, reversible=reversible, quantized=quantized)
    return model


def merge_report(model: nn.Module) -> dict[str, float]:
    """FQN → share of the update that rounding lost in the merge, ‖merged − base − Δ‖ / ‖Δ‖, for every merged layer.

    Of a quantized base it is measured against the unpacked weight; 1 and more means that nothing of the update is left to rely on.
    """
    return {name: layer.merge_loss for name, layer in lora_layers(model) if layer.merged}


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Take every update out again; the base weights are bit for bit what they were.

    Raises:
        ValueError: a layer cannot go back (its way back was not kept, or its adapter changed); the message names it.
    """
    done: list[LoRALayer] = []
    untied: dict[LoRALayer, list[Any]] = {layer: layer.__dict__.get("_untied", []) for _, layer in lora_layers(model)}
    for name, layer in _ready(model, [(name, layer) for name, layer in lora_layers(model) if layer.merged]):
        try:
            layer.unmerge_weights()
        except ValueError as error:
            for earlier in done:
                _merge_again(earlier, untied[earlier])
            raise ValueError(f"{name!r} cannot be unmerged: {error}.") from error
        done.append(layer)
    return model


def unmerge_for_now(model: nn.Module) -> Callable[[], None]:
    """Unmerge; the function returned merges again what was merged, as it was.

    Raises:
        ValueError: as :func:`unmerge_lora`.
    """
    merged = [(name, layer) for name, layer in lora_layers(model) if layer.merged]
    untied = {layer: layer.__dict__.get("_untied", []) for _, layer in merged}
    unmerge_lora(model)

    def merge() -> None:
        for _, layer in _ready(model, merged):
            _merge_again(layer, untied[layer])

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


def _merge_again(layer: LoRALayer, untied: Sequence[Any] = ()) -> None:
    """Merging is deterministic: the merged weight comes back as it was."""
    for config in untied:
        config.tie_word_embeddings = False
    if untied:
        layer._untied = list(untied)
    layer.merge_weights(device=layer._device, quantized=getattr(layer, "_quantized", None))


def tied_weights(model: nn.Module, layers: Mapping[str, nn.Module] | None = None) -> dict[str, list[str]]:
    """FQN of a layer not merged yet → names of the parameters elsewhere that are the same tensor as its weight.

    Args:
        model: with or without adapters.
        layers: FQN → layer, of those that are asked about; default: the adapted ones.
    """
    owners: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{module_name}.{name}" if module_name else name)
    tied = {}
    for name, layer in (dict(lora_layers(model)) if layers is None else layers).items():
        others = [owner for owner in owners[id(layer.weight)] if owner != (f"{name}.weight" if name else "weight")]
        if others and not getattr(layer, "merged", False):
            tied[name] = others
    return tied


def _ready(model: nn.Module, layers: list[tuple[str, LoRALayer]]) -> Iterator[tuple[str, LoRALayer]]:
    """The layers, each at a time when its weight may be written to."""
    if not is_distributed():
        yield from layers
        return
    from lightning_lora.model import parallel

    reshard(model)
    for batch in parallel.summoned(model, layers):
        yield from batch


def _untie_configs(model: nn.Module) -> list[Any]:
    """Hugging Face ties again on save and load unless the config says not to; the configs that said so."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    tied = [config for config in configs if getattr(config, "tie_word_embeddings", False)]
    for config in tied:
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    return tied
