"""Read what PEFT's ``target_parameters`` adapts on modules with several weights, such as experts: whose pair is which, and its scaling.

PEFT gives every parameter a rank and an alpha of its own. Here a module has one of each, that of its weight with the highest rank; the
kind converts the tensors accordingly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_lora.adapter_io.peft_rules import is_target_parameter, pattern_value
from lightning_lora.config import SCALINGS, LoRAConfig
from lightning_lora.layers.classes import adapted_class
from lightning_lora.registry import kind_of

_WRAPPED = re.compile(r"lora_[AB](_\d+)?")
_OURS = "0.19"  # the release whose layout our own files have


@dataclass(frozen=True)
class Stack:
    """One module of a file's.

    Attributes:
        scalings: weight that the file adapts → its scaling.
        rank_pattern: the module's rank.
        alpha_pattern: its alpha.
    """

    scalings: dict[str, float]
    rank_pattern: int
    alpha_pattern: float


def is_stack(module: nn.Module) -> bool:
    """Return True if PEFT adapts this module's parameters one by one."""
    kind: Any = kind_of(type(module))
    return hasattr(kind, "from_peft_stacks") and kind.peft_reads


def targeted_stacks(fields: dict[str, Any], modules: Mapping[str, nn.Module]) -> dict[str, Stack]:
    """Return FQN → what the JSON says of it, for each such module of which ``target_parameters`` names a weight.

    Args:
        fields: PEFT's JSON.
        modules: FQN → module of the model.
    """
    found = {}
    scaling = SCALINGS["rslora" if fields.get("use_rslora") else "standard"]
    for fqn, module in modules.items() if fields.get("target_parameters") else ():
        weights = [name for name in module._parameters if is_stack(module) and is_target_parameter(fields, f"{fqn}.{name}")]
        if weights:
            said = {
                name: (
                    pattern_value(fields.get("rank_pattern"), f"{fqn}.{name}", fields.get("r", 8)),
                    pattern_value(fields.get("alpha_pattern"), f"{fqn}.{name}", fields.get("lora_alpha", 8)),
                )
                for name in weights
            }
            scalings = {name: scaling(alpha, rank) for name, (rank, alpha) in said.items()}
            rank, _, alpha = max((rank, scalings[name], alpha) for name, (rank, alpha) in said.items())
            found[fqn] = Stack(scalings, rank, float(alpha))
    return found


def unstacked(
    tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], stacks: Mapping[str, Stack], fields: dict[str, Any] | None, where: str
) -> dict[str, Tensor]:
    """Return a file's tensors with those of such modules as adapter parameters of ours.

    Args:
        tensors: by our names; wrapped weights have ``lora_A_1`` and so on.
        modules: FQN → module of the model.
        stacks: of :func:`targeted_stacks`.
        fields: PEFT's JSON; None for a file of ours.
        where: the file's path, for messages.

    Raises:
        ValueError: the tensors do not fit, or a parameter is targeted that the kind does not adapt.
    """
    found: dict[str, Tensor] = {}
    own: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        if _WRAPPED.fullmatch(last) and owner in modules and is_stack(modules[owner]):
            own.setdefault(owner, {})[last] = tensor
        else:
            found[name] = tensor
    for fqn, parts in own.items():
        module = modules[fqn]
        kind: Any = adapted_class(type(module), LoRAConfig().variant)
        version: str | None = _OURS
        if fields is None:
            scalings = dict.fromkeys(kind.adapted, 1.0)
        else:
            scalings, version = stacks[fqn].scalings if fqn in stacks else {}, fields.get("peft_version")
        try:
            if unknown := [name for name in scalings if name not in kind.adapted]:
                raise ValueError(f"target_parameters names its {unknown[0]}, which is not a weight of experts: LoRA there is not supported")
            found |= {f"{fqn}.{name}": tensor for name, tensor in kind.from_peft_stacks(module, parts, scalings, version).items()}
        except ValueError as error:
            raise ValueError(f"{where}: {fqn!r}: {error}.") from error
    return found
