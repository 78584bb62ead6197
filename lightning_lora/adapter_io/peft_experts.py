"""Write names by which PEFT adapts layers that it would otherwise mistake for experts.

Since transformers 5 the experts of some models are one tensor per projection. For older files, PEFT 0.21 turns names such as
``gate_proj`` in ``target_modules`` into ``target_parameters`` of the experts. It does so for the dense and shared MLPs of those models
too, and drops their adapters. A layer that ``target_parameters`` names by its weight keeps its adapter.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from lightning_lora.adapter_io.peft_format import anchored, target_names

# Family → last parts of names that PEFT takes for experts or the router.
_NAMES = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}


def beside_experts(fields: dict[str, Any], family: str, layers: Mapping[str, nn.Module], modules: Collection[str]) -> dict[str, Any]:
    """Return the JSON. In it, the layers that PEFT would take for experts are named by their weights.

    For such names PEFT has only plain LoRA on ``nn.Linear``, without dropout. A warning names what that loses.

    Args:
        fields: PEFT's JSON.
        family: the family of the model's experts, ``""`` if it has none.
        layers: FQN → adapted layer.
        modules: FQNs of all modules.
    """
    mistaken = [fqn for fqn in layers if fqn.rpartition(".")[2] in _NAMES.get(family, ())]
    if family not in _NAMES or fields["peft_type"] != "LORA" or not (mistaken or isinstance(fields["target_modules"], str)):
        return fields
    others = [fqn for fqn in layers if fqn not in mistaken]
    names = fields["target_modules"]
    short = names if isinstance(names, str) else [name for name in names if name.rpartition(".")[2] not in _NAMES[family]]
    fields = fields | {"target_modules": target_names(short, others, fields["modules_to_save"] or (), modules)}
    odd = [fqn for fqn in mistaken if not isinstance(layers[fqn], nn.Linear)]
    if odd or (mistaken and fields.get("use_dora")) or isinstance(fields["target_modules"], str):
        why = "DoRA" if fields.get("use_dora") else f"an adapter on {odd[0]!r}" if odd else "names that end in one another"
        warnings.warn(
            f"PEFT 0.21 takes {(mistaken or others)[0]!r} for experts of this model, and cannot be told otherwise with {why}: load_adapter"
            " reads this folder, PEFT does not.",
            stacklevel=3,
        )
        return fields | {"target_modules": target_names(list(layers), list(layers), fields["modules_to_save"] or (), modules)}
    if mistaken and fields["lora_dropout"]:
        warnings.warn(
            f"PEFT 0.21 has no dropout on {mistaken[0]!r} of this model: the folder says lora_dropout=0, for PEFT's readers."
            " load_adapter has the dropout.",
            stacklevel=3,
        )
    if mistaken:
        by_weight = [*(fields.get("target_parameters") or ()), *(f"{fqn}.weight" for fqn in mistaken)]
        fields |= {"target_parameters": sorted(by_weight), "lora_dropout": 0.0}
    anchors = {anchored(fqn): anchored(fqn) + re.escape(".weight") for fqn in mistaken}
    for name in ("rank_pattern", "alpha_pattern"):
        fields[name] = {anchors.get(key, key): value for key, value in fields[name].items()}
    return fields
