"""Give every layer of an adapter one rank and one scaling, as servers expect.

Ranks are padded with zeros, which add nothing. What differs in scaling is multiplied into B, in fp32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_lora.adapter_io.export_targets import MERGE, Target
from lightning_lora.adapter_io.files import AdapterFolder
from lightning_lora.adapter_io.peft_names import PREFIX
from lightning_lora.adapter_io.peft_rules import pattern_value
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.patterns import exactly

_PAIR = ("A", "B")
_FACTOR = re.compile(
    r"^(?:module\.)?base_model\.model\.(?P<owner>.+)\.lora_(?P<embedding>embedding_)?(?P<part>A|B|magnitude_vector)(?:\.(?!bias$)\w+)*$"
)


@dataclass
class FileLayer:
    """An adapted layer in PEFT's file.

    Attributes:
        tensors: ``A`` (r, in), ``B`` (out, r) and, for DoRA, ``magnitude_vector``.
        scaling: the factor of B·A.
        embedding: True for an embedding, whose tensors have other names.
    """

    tensors: dict[str, Tensor]
    scaling: float
    embedding: bool

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.tensors["A"].shape[0]


def layers_of(tensors: Mapping[str, Tensor], fields: dict[str, Any], where: str) -> tuple[dict[str, FileLayer], list[str]]:
    """Return FQN → adapted layer, and the names of all tensors that are no layer's."""
    layers: dict[str, FileLayer] = {}
    others: list[str] = []
    for name, tensor in tensors.items():
        match = _FACTOR.match(clean_name(name))
        if match is None:
            others.append(name)
            continue
        fqn = match["owner"]
        rank = pattern_value(fields.get("rank_pattern"), fqn, fields.get("r", 8))
        alpha = pattern_value(fields.get("alpha_pattern"), fqn, fields.get("lora_alpha", 8))
        scaling = alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)
        layers.setdefault(fqn, FileLayer({}, scaling, bool(match["embedding"]))).tensors[match["part"]] = tensor
    for fqn, layer in layers.items():
        if lacking := [part for part in _PAIR if part not in layer.tensors]:
            raise ValueError(f"{where}: {fqn!r} has no lora_{lacking[0]}; the adapter is not whole.")
    return layers, others


def one_rank(adapter: AdapterFolder, layers: dict[str, FileLayer], rules: Target, component: str | None) -> AdapterFolder:
    """Return the adapter with one rank and one scaling for all layers."""
    added = {fqn: layer for stack in rules.stacks for fqn, layer in _stand_ins(stack, rules.stacks_unless, layers)}
    layers = layers | added
    largest = max(layer.rank for layer in layers.values())
    rank = next((rank for rank in rules.ranks if rank >= largest), largest)
    scalings = {layer.scaling for layer in layers.values()}
    # One scaling stays in the config, where no number changes; a pipeline's file has no config, and several have no common one.
    common = scalings.pop() if len(scalings) == 1 and component is None else 1.0
    prefix = f"{component}." if component else PREFIX
    tensors = {prefix + name: tensor for fqn, layer in layers.items() for name, tensor in _padded(fqn, layer, rank, common)}
    alpha = common * rank
    alpha = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha
    one: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    fields = adapter.fields | one | _targets(adapter.fields, layers, bool(added))
    config = adapter.config
    if config is not None:
        config = replace(config, rank=rank, alpha=float(alpha), scaling="standard", rank_pattern={}, alpha_pattern={}, init="kaiming")
        if added:
            config = replace(config, target_modules=[exactly(fqn) for fqn in sorted(layers)], exclude_modules=(), layers=None)
    return replace(adapter, tensors=tensors, fields=fields, config=config)


def _targets(fields: dict[str, Any], layers: Iterable[str], added: bool) -> dict[str, Any]:
    """Return ``target_modules`` as a list, and neutral values of the fields that narrow it. SGLang takes the last part of each name."""
    narrowing: dict[str, Any] = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    names = fields.get("target_modules")
    if added or not isinstance(names, list) or any(fields.get(key) for key in narrowing):
        names = sorted(layers)
    return {"target_modules": names} | {key: value for key, value in narrowing.items() if key in fields}


def _stand_ins(stack: Mapping[str, str | None], unless: Collection[str], layers: dict[str, FileLayer]) -> Iterator[tuple[str, FileLayer]]:
    """Yield FQN and a zero adapter for each layer that is stacked with adapted ones and has none."""
    parents = {fqn.rpartition(".")[0] for fqn in layers if fqn.rpartition(".")[2] in stack}
    for parent in sorted(parents - {fqn.rpartition(".")[0] for fqn in layers if fqn.rpartition(".")[2] in unless}):
        there = {name: layers.get(f"{parent}.{name}") for name in stack}
        for name, twin in stack.items():
            if there[name] is not None:
                continue
            alike = there[twin] if twin else None
            if alike is None:
                present = ", ".join(other for other, layer in there.items() if layer is not None)
                raise ValueError(
                    f"{parent!r} has an adapter on {present} and none on {name}; the server computes {', '.join(stack)} as one and cannot"
                    f" leave {name} out. Train with all of them in target_modules, or {MERGE}."
                )
            yield f"{parent}.{name}", FileLayer({part: torch.zeros_like(alike.tensors[part]) for part in _PAIR}, alike.scaling, False)


def _padded(fqn: str, layer: FileLayer, rank: int, scaling: float) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of a layer with this rank and scaling. Rows of A and columns of B that are added are zero."""
    A, B = (layer.tensors[part] for part in _PAIR)
    if layer.scaling != scaling:  # in fp32: half precision would round again
        B = B.float() * (layer.scaling / scaling)
    missing = rank - A.shape[0]
    if missing:
        if A.shape[0] != B.shape[1]:
            raise ValueError(f"{fqn!r} is a grouped convolution of rank {A.shape[0]}; it cannot be padded to {rank}. Use one rank for all.")
        A = torch.cat([A, A.new_zeros(missing, *A.shape[1:])])
        B = torch.cat([B, B.new_zeros(B.shape[0], missing, *B.shape[2:])], dim=1)
    for part, tensor in (("A", A), ("B", B)):
        yield f"{fqn}.lora_embedding_{part}" if layer.embedding else f"{fqn}.lora_{part}.weight", tensor.contiguous()
    if "magnitude_vector" in layer.tensors:
        yield f"{fqn}.lora_magnitude_vector", layer.tensors["magnitude_vector"]
