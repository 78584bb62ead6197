"""Recognise the linears of a block that read the same input, and let them share work. On by default; :func:`unfuse` undoes it.

Parameters stay in their layers and state dicts are unchanged. Whatever does not fit (another variant, a quantized or sharded base, merged
layers, inputs that differ after all) is computed layer by layer, as if this had not been called.
"""

from __future__ import annotations

from torch import nn

from lightning_lora.layers import LoRALinear
from lightning_lora.layers.siblings import Siblings

#: Names under which models keep projections of one input, side by side in one parent.
TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


def fuse(model: nn.Module) -> list[Siblings]:
    """Let adapted linears that read the same input share it.

    Args:
        model: a model with adapters; its forward passes are not changed, its layers' are.

    Returns:
        The groups there are now.
    """
    groups = []
    for name, parent in model.named_modules():
        for family in TOGETHER:
            children = [(f"{name}.{child}", getattr(parent, child, None)) for child in family]
            found = [(fqn, layer) for fqn, layer in children if isinstance(layer, LoRALinear)]
            if len(found) > 1:
                group = Siblings([fqn for fqn, _ in found], [layer for _, layer in found])
                groups.append(group)
                for layer in group.layers:
                    layer.lora_siblings = group
    return groups


def unfuse(model: nn.Module) -> None:
    """Compute every adapted linear by itself again."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_siblings = None
