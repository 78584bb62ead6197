"""Plan a merge into one weight, and its undoing: compute everything first, then change the layer.

A failure, above all a lack of memory, happens while the plan is made, and nothing has changed then. Carrying out a plan copies into
allocated memory, or exchanges tensors. It sets the layer's state last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from lightning_lora.layers import merging
from lightning_lora.layers.rounding import measure
from lightning_lora.layers.state import MergeRecord, Quantized
from lightning_lora.quantization import formats
from lightning_lora.quantization.content import weight_digest
from lightning_lora.utils.parameters import make_parameter
from lightning_lora.utils.sharding import local_shard, local_tensor, shard_groups

Plan = Callable[[], None]  # carries it out


def plan_merge(layer: Any, device: torch.device | str | None, reversible: bool, quantized: Quantized | None) -> Plan:
    """Compute the merge of a layer that is not merged and can be merged. Change nothing.

    Args:
        layer: a layer with one weight, its ``weight``.
        device: where to compute (default: the weight's device).
        reversible: keep what :func:`plan_unmerge` needs.
        quantized: how to merge into a quantized weight.
    """
    if formats.format_of(layer) is not None:
        return _plan_packed(layer, device, reversible, quantized)
    weight, shared = layer.weight, layer.lora_state.shares_weight
    device = torch.device(device) if device is not None else weight.device
    mine = weight.data if shared else local_tensor(weight.detach())
    digest = weight_digest(layer)
    delta, out_scale = layer._merge_parts(device)
    delta, out_scale = local_shard(delta, weight), None if out_scale is None else local_shard(out_scale, weight)
    undo: merging.SparseUndo | merging.OriginalUndo | None
    groups = shard_groups(weight)
    merged, undo, rounding = merging.merged_with_undo(
        mine.to(device), delta, out_scale, reversible=reversible and not shared, groups=groups
    )
    if shared:  # another module uses it: it is replaced, never written to
        new, undo = make_parameter(merged.to(weight.device), False), merging.OriginalUndo(weight) if reversible else None
    record = MergeRecord(undo, digest, device, rounding)

    def carry_out() -> None:
        if shared:
            layer.weight = new
        else:
            mine.copy_(merged)
        layer.lora_state.merge = record

    return carry_out


def _plan_packed(layer: Any, device: torch.device | str | None, reversible: bool, quantized: Quantized | None) -> Plan:
    """Compute the merge into a quantized weight. The undo record holds the quantized tensors themselves."""
    packing = formats.format_of(layer)
    assert packing is not None
    original, digest, home = formats.take(layer, packing), weight_digest(layer), layer.weight.device
    device = torch.device(device) if device is not None else home
    base, delta = layer.base_weight().to(device), layer.exact_delta(device)
    exact = base.to(delta.dtype) + delta
    try:
        if quantized == "requantize":
            packing.requantize(layer, exact.to(home))
            merged = layer.base_weight()
        else:
            layer.weight = make_parameter(exact.to(base.dtype).to(home), False)
            for name in original.attributes:
                del layer.__dict__[name]
            plain = packing.unpacked_class(layer)
            if plain is not None:
                layer.rebase_class(plain)
            merged = layer.weight.detach()
        new = formats.take(layer, packing)
        rounding = measure(base.to(delta.dtype), delta, merged.to(device))
    finally:
        original.put_back(layer)
    record = MergeRecord(original if reversible else None, digest, device, rounding, quantized)

    def carry_out() -> None:
        _exchange(layer, new, original.attributes)
        layer.lora_state.merge = record

    return carry_out


def plan_unmerge(layer: Any) -> Plan:
    """Compute the base weight of a merged layer, bit for bit. Change nothing.

    Raises:
        ValueError: no undo record was kept, or the adapter changed since the merge.
    """
    record = layer.lora_state.merge
    undo = record.undo
    if undo is None:
        raise ValueError(
            "no undo record was kept (merged with reversible=False, or other weights were loaded since): load the base model again"
        )
    if isinstance(undo, merging.SparseUndo):
        # On the device of the merge: the product must be the same to the bit.
        mine = local_tensor(layer.weight.detach())
        delta = local_shard(layer._merge_parts(record.device, scaled=False)[0], layer.weight)
        base = merging.unmerge(mine.to(record.device), delta, undo)
    elif isinstance(undo, formats.QuantizedUndo):
        packed = _moved(layer, undo)

    def carry_out() -> None:
        if isinstance(undo, merging.SparseUndo):
            mine.copy_(base)
        elif isinstance(undo, formats.QuantizedUndo):
            _exchange(layer, packed, packed.attributes)
        else:
            layer.weight = undo.weight
        layer.lora_state.merge = None

    return carry_out


def _moved(layer: Any, undo: formats.QuantizedUndo) -> formats.QuantizedUndo:
    """Return the packed weight on the layer's device: the model may have moved since the merge, but not the undo record."""
    home = layer.weight.device
    if undo.weight.device == home:
        return undo
    merged = _taken(layer, undo.attributes)
    try:
        undo.put_back(layer)
        layer.to(home)
        return _taken(layer, undo.attributes)
    finally:
        _exchange(layer, merged, undo.attributes)


def _taken(layer: Any, names: Collection[str]) -> formats.QuantizedUndo:
    return formats.QuantizedUndo(type(layer), layer.weight, {name: layer.__dict__[name] for name in names if name in layer.__dict__})


def _exchange(layer: Any, state: formats.QuantizedUndo, names: Collection[str]) -> None:
    """Replace the layer's attributes of these names by a kept state."""
    for name in names:
        layer.__dict__.pop(name, None)
    state.put_back(layer)
