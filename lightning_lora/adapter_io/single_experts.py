"""Read adapters on single experts, as files from before transformers 5 have them (``block_sparse_moe.experts.0.w1``).

The experts of a layer are one tensor per projection now, some of two projections, one below the other. So a pair of each expert becomes a
stack of pairs, and pairs of several projections become one whose B is block-diagonal. transformers' own conversion of base weights says
what becomes what. PEFT 0.21 converts such files to the same products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapter_io.peft_names import conversion_of
from lightning_lora.adapter_io.peft_rules import pattern_value
from lightning_lora.adapter_io.peft_stacks import Stack, is_stack
from lightning_lora.config import SCALINGS, LoRAConfig
from lightning_lora.layers.classes import adapted_class

_MERGING = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])  # names of operations: experts are stacked, projections put below


@dataclass
class _Part:
    """The pairs of one projection.

    Attributes:
        scaling: α/r.
        pairs: expert → ``lora_A`` and ``lora_B``.
    """

    scaling: float
    pairs: dict[int, dict[str, Tensor]] = field(default_factory=dict)


def stacked(
    tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], root: nn.Module, fields: dict[str, Any], where: str
) -> tuple[dict[str, Tensor], dict[str, Stack]]:
    """Return a file's tensors with stacks in place of single experts, and FQN → the rank, alpha and scalings of each module of experts.

    Args:
        tensors: by the file's names.
        modules: FQN → module of the model.
        root: the model.
        fields: PEFT's JSON.
        where: the file's path, for messages.

    Raises:
        ValueError: an expert's pair is missing.
    """
    scaling = SCALINGS["rslora" if fields.get("use_rslora") else "standard"]
    rest: dict[str, Tensor] = {}
    found: dict[str, dict[str, list[_Part | None]]] = {}  # module → weight → its projections, in their order
    if fields.get("use_dora"):  # a magnitude for each expert's outputs has no place
        return dict(tensors), {}
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        place = None if owner in modules or last not in ("lora_A", "lora_B") else _place(root, owner, modules)
        if place is None:
            rest[name] = tensor
            continue
        fqn, weight, part, many, expert = place
        parts = found.setdefault(fqn, {}).setdefault(weight, [None] * many)
        alpha = pattern_value(fields.get("alpha_pattern"), owner, fields.get("lora_alpha", 8))
        own = parts[part] = parts[part] or _Part(scaling(alpha, tensor.shape[0 if last == "lora_A" else 1]))
        own.pairs.setdefault(expert, {})[last] = tensor
    stacks = {}
    for fqn, weights in found.items():
        scalings = {weight: max(part.scaling for part in parts if part is not None) for weight, parts in weights.items()}
        pairs = {weight: _pair(parts, scalings[weight], modules[fqn], weight, f"{where}: {fqn}") for weight, parts in weights.items()}
        kind: Any = adapted_class(type(modules[fqn]), LoRAConfig().variant)
        rest |= {f"{fqn}.{name}": tensor for name, tensor in kind.from_pairs(modules[fqn], pairs, scalings).items()}
        rank, common = max((A.shape[1], scalings[weight]) for weight, (A, _) in pairs.items())
        stacks[fqn] = Stack(scalings, rank, common * rank / scaling(rank, rank))
    return rest, stacks


def _place(root: nn.Module, owner: str, modules: Mapping[str, nn.Module]) -> tuple[str, str, int, int, int] | None:
    """Return module, weight, number of the projection and how many there are, and number of the expert. None if it is no such name."""
    known = conversion_of(root, owner)
    if known is None or [type(each).__name__ for each in known.conversion.operations] not in _MERGING:
        return None
    fqn, _, weight = known.name.rpartition(".")
    numbers = [int(part) for part in owner.split(".") if part.isdigit()]
    if fqn not in modules or not is_stack(modules[fqn]) or not numbers:
        return None
    patterns = known.conversion.source_patterns
    return fqn, weight, patterns.index(known.pattern), len(patterns), numbers[-1]


def _pair(parts: list[_Part | None], scaling: float, module: nn.Module, weight: str, where: str) -> tuple[Tensor, Tensor]:
    """Return A (E, Σr, in) and B (E, Σout, Σr) of one weight, whose scaling is given."""
    tensor: Any = module._parameters[weight]
    experts = tensor.shape[0]
    there: list[tuple[Tensor, Tensor] | None] = []
    for part in parts:
        for expert in range(experts) if part is not None else ():
            if len(part.pairs.get(expert, ())) < 2:  # type: ignore[union-attr]
                raise ValueError(f"{where}.{weight}: the file has no whole pair for expert {expert}, and has one for others.")
        if part is None:
            there.append(None)
        else:
            A, B = (torch.stack([part.pairs[expert][name] for expert in range(experts)]) for name in ("lora_A", "lora_B"))
            there.append((A, B * (part.scaling / scaling)))
    given = [pair for pair in there if pair is not None]
    blocks, column, width = [], 0, sum(A.shape[1] for A, _ in given)
    for pair in there:
        if pair is None:  # a projection without adapters
            blocks.append(given[0][1].new_zeros(experts, given[0][1].shape[1], width))
        else:
            B = pair[1]
            blocks.append(nn.functional.pad(B, (column, width - column - B.shape[2])))
            column += B.shape[2]
    return torch.cat([A for A, _ in given], 1), torch.cat(blocks, 1)
