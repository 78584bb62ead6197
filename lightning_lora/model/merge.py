"""Merge a model's adapters into its weights, and unmerge them again, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn

from lightning_lora.layers.adapting import why_another_shape
from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.layers.linearity import why_no_longer_linear
from lightning_lora.layers.rounding import Rounding, check_limit, check_lost
from lightning_lora.layers.state import Quantized
from lightning_lora.model.ties import adapted_weights, tied_weights, untying
from lightning_lora.utils.names import join
from lightning_lora.utils.sharding import is_distributed, is_flattened, is_sharded, reshard


def merge_lora(
    model: nn.Module,
    *,
    untie: bool = False,
    reversible: bool = True,
    device: torch.device | str | None = None,
    quantized: Quantized | None = None,
    max_lost: float | None = None,
) -> nn.Module:
    """Add every update to its base weight. Inference then costs nothing extra, and the state dict has the base's keys only.

    Sums are computed in fp32 and rounded once. ``merge_report`` reports the loss by rounding. Merging twice changes nothing.

    Args:
        model: an adapted model.
        untie: copy the weight of an adapted layer that another module shares (tied embeddings, views of one tensor).
            Other ties stay.
        reversible: keep the undo record that :func:`unmerge_lora` needs (a few percent of the weights' bytes).
        device: device of the sums, layer by layer. Default: each weight's own.
        quantized: how to merge into a quantized weight. A quantized model has no default. ``"dequantize"``: make the layer a plain one,
            whose weight has the dtype before quantization. Only the rounding to this dtype is lost. ``"requantize"``: pack the sum
            again. The update is then rounded to a grid of a few bits, which loses most of a small update; see ``merge_report``.
            Both keep the packed weight for :func:`unmerge_lora`, unless ``reversible`` is False.
        max_lost: the largest share of an update that rounding may lose, as in ``merge_report``. If a layer loses more, all are unmerged.

    Returns:
        The same ``model``.

    Raises:
        ValueError: the model has no adapter, or one holds NaN or infinity; a layer's forward scales or gates its product since it was
            adapted; a weight is quantized and ``quantized`` is None; or a weight is tied, and ``untie`` is False, the weight is sharded
            or no file could hold the model untied; or rounding would lose more than
            ``max_lost`` of an update. Nothing is merged then.

    Examples:
        >>> model = load_adapter(model, "runs/legal/adapter")
        >>> model = merge_lora(model, max_lost=0.3)
        >>> model = unmerge_lora(model)  # bit for bit
    """
    check_limit(max_lost)
    _check_adapted(model, "merge")
    if is_distributed():
        reshard(model)  # what FSDP2 keeps gathered after a forward pass does not look sharded
    layers = [(name, layer) for name, layer in lora_layers(model) if not layer.merged]
    for name, layer in layers:
        if misfit := why_another_shape(layer, type(layer)):
            raise ValueError(f"{name!r} cannot be merged: {misfit}, and its adapter does not fit: prune before apply_lora.")
        reason = layer.merge_refusal(quantized) or why_no_longer_linear(layer)
        if reason:
            raise ValueError(f"{name!r} cannot be merged: {reason}.")
    tied = tied_weights(model)
    if tied and not untie:
        name, others = next(iter(tied.items()))
        raise ValueError(
            f"{name} is tied to {', '.join(others)}: merging would change both. Pass untie=True to give it a weight"
            " of its own (that tie is no longer declared by the model then, so it is saved and loaded untied), or leave it unmerged."
        )
    if tied and (is_flattened(model) or any(is_sharded(weight) for name, weight in adapted_weights(model).items() if name in tied)):
        name, others = next(iter(tied.items()))
        raise ValueError(
            f"{name} is tied to {', '.join(others)}, and its wrapper would not know a weight of its own: save the adapter and merge in a"
            " single process, or leave it unmerged."
        )
    plan = untying(model, tied) if tied else None

    def merge(name: str, layer: LoRALayer) -> None:
        shared = [part for weight, part in layer.by_weight().items() if join(name, weight) in tied]
        for part in shared:
            part.lora_state.shares_weight = True
        layer.merge_weights(device=device, quantized=quantized)
        if shared:
            layer.untie(plan)

    _all_or_none(model, layers, merge, lambda layer: layer.unmerge_weights())
    if max_lost is not None:
        try:
            check_lost(roundings(model, layers), max_lost)
        except ValueError:
            _unmerge(model, layers)
            raise
    for layer in [layer for _, layer in layers if not reversible]:
        layer.lora_state.untying = None
        for part in layer.by_weight().values():
            part.lora_state.merge.undo = None  # kept until here, to undo all merges if one layer had failed
    return model


def merge_report(model: nn.Module) -> dict[str, float]:
    """Return what each merged layer lost of its update by rounding. :func:`~lightning_lora.merge_certificate` has more.

    Args:
        model: a merged model.

    Returns:
        Module name → ‖merged − base − Δ‖ / ‖Δ‖, where the base of a quantized layer is its dequantized weight. 0: nothing was lost; 1 or
        above: the update is lost. Layers that are not merged have no entry.

    Examples:
        >>> model = merge_lora(load_adapter(model, "runs/legal/adapter"))
        >>> worst = max(merge_report(model).values())
    """
    losses = {name: layer.merge_loss for name, layer in lora_layers(model)}
    return {name: loss for name, loss in losses.items() if loss is not None}


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Remove every merged update. The base weights are restored bit for bit.

    Args:
        model: a model whose layers were merged with ``reversible=True``; layers that are not merged stay as they are.

    Returns:
        The same ``model``, with its adapters active again.

    Raises:
        ValueError: the model has no adapter; or a layer cannot be unmerged, since its merge was not reversible or its adapter changed.
            The message names it.

    Examples:
        >>> model = load_adapter(model, "runs/legal/adapter")
        >>> before = model.state_dict()["model.layers.0.self_attn.q_proj.weight"].clone()
        >>> model = unmerge_lora(merge_lora(model))
        >>> torch.equal(model.state_dict()["model.layers.0.self_attn.q_proj.weight"], before)
        True
    """
    _check_adapted(model, "unmerge")
    unmerge_layers(model)
    return model


def unmerge_layers(model: nn.Module) -> None:
    """Remove every merged update, like :func:`unmerge_lora`, of a model that may have no adapters."""
    _unmerge(model, [(name, layer) for name, layer in lora_layers(model) if layer.merged])


def _check_adapted(model: nn.Module, what: str) -> None:
    if next(lora_layers(model), None) is None:
        raise ValueError(
            f"{type(model).__name__} has no LoRA layers to {what}; call load_adapter(model, folder) or apply_lora(model, config=...) first."
        )


def _unmerge(model: nn.Module, layers: list[tuple[str, LoRALayer]]) -> None:
    states = {layer: layer.lora_state.copy() for _, layer in layers}

    def unmerge(name: str, layer: LoRALayer) -> None:
        try:
            layer.unmerge_weights()
        except ValueError as error:
            raise ValueError(f"{name!r} cannot be unmerged: {error}.") from error

    _all_or_none(model, layers, unmerge, lambda layer: layer.merge_again(states[layer]))


@torch.no_grad()
def roundings(model: nn.Module, layers: list[tuple[str, LoRALayer]] | None = None) -> dict[str, Rounding | None]:
    """Return FQN → what rounding lost in the merge of each layer (default: all), or would lose in one. Nothing is changed.

    A quantized weight that is not merged is measured as if it were dequantized. A layer with several weights has an entry for each, named
    by the weight's full name. None stands for a merge by code outside this package. On a sharded model this is a collective.
    """
    found: dict[str, Rounding | None] = {}
    for fqn, layer in _ready(model, list(lora_layers(model)) if layers is None else layers):
        for name, part in layer.by_weight().items():
            record = part.lora_state.merge
            rounding = part.merged_weight()[1] if record is None else record.rounding
            found[fqn if len(layer.adapted) == 1 else join(fqn, name)] = rounding
    return found


def remerging(model: nn.Module) -> Callable[[], None]:
    """Return a function that merges the layers that are merged now, to the same bits, if they are no longer merged. Nothing is changed."""
    merged = [(name, layer) for name, layer in lora_layers(model) if layer.merged]
    states = {layer: layer.lora_state.copy() for _, layer in merged}

    def merge() -> None:
        _all_or_none(model, merged, lambda _, layer: layer.merge_again(states[layer]), lambda layer: layer.unmerge_weights())

    return merge


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """Unmerge the model inside the ``with`` block. Afterwards merge the same layers again.

    Raises:
        ValueError: as :func:`unmerge_lora`.
    """
    merge = remerging(model)
    unmerge_layers(model)
    try:
        yield
    finally:
        merge()


def _ready(model: nn.Module, layers: list[tuple[str, LoRALayer]]) -> Iterator[tuple[str, LoRALayer]]:
    """Yield the layers. While a layer is yielded, its weight may be written to."""
    if not is_distributed():
        yield from layers
        return
    from lightning_lora.model import parallel

    reshard(model)
    for batch in parallel.summoned(model, layers):
        yield from batch


def _all_or_none(
    model: nn.Module,
    layers: list[tuple[str, LoRALayer]],
    change: Callable[[str, LoRALayer], None],
    take_back: Callable[[LoRALayer], None],
) -> None:
    """Change every layer, or none.

    A single layer changes completely or not at all. After a failure the earlier layers are changed back. A layer for which memory is
    lacking even then stays changed, and its state says so: the model computes the same. The layers of a sharded model stay changed too if
    other ranks may not have failed, because these ranks would have to take part.
    """
    done: list[LoRALayer] = []
    try:
        for name, layer in _ready(model, layers):
            change(name, layer)
            done.append(layer)
    except BaseException as error:
        alone = not isinstance(error, ValueError) and (is_flattened(model) or any(is_sharded(p) for p in model.parameters()))
        for layer in [] if alone else reversed(done):
            with suppress(RuntimeError, MemoryError):
                take_back(layer)
        raise
