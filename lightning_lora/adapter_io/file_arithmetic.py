"""Read adapter folders as low-rank pairs, and write the pairs that were computed from them as a folder."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.adapter_io.files import CONFIG, TENSORS, AdapterFolder, check_free, encoded, read_raw
from lightning_lora.adapter_io.one_rank import FileLayer, layers_of
from lightning_lora.adapter_io.peft_format import anchored
from lightning_lora.adapter_io.peft_names import PREFIX
from lightning_lora.adapter_io.peft_rules import pattern_value
from lightning_lora.config import ALL_LINEAR, LoRAConfig
from lightning_lora.storage.atomic_files import write_atomic
from lightning_lora.storage.folder_commit import commit
from lightning_lora.utils.fused_layouts import GATE_UP, QKV
from lightning_lora.utils.patterns import compile_patterns, exactly


@dataclass(frozen=True)
class Pairs:
    """An adapter folder whose update of every layer is ``scaling · B·A``.

    Attributes:
        path: the folder.
        adapter: its content.
        layers: FQN → adapted layer.
        others: names of the tensors that are no layer's: modules trained in full, biases.
    """

    path: Path
    adapter: AdapterFolder
    layers: dict[str, FileLayer]
    others: list[str]


def read_pairs(folder: str | Path) -> Pairs:
    """Read an adapter folder, ours or PEFT's.

    Raises:
        ValueError: it cannot be read, or a layer's update is not ``scaling · B·A`` of one pair.
    """
    path = Path(folder)
    adapter = read_raw(path)
    if (kind := adapter.fields.get("peft_type", "LORA")) != "LORA":
        raise ValueError(f"{path} is a {kind} adapter, whose layers share factors; merge it into its base instead.")
    layers, others = layers_of(adapter.tensors, adapter.fields, str(path))
    if not layers:
        raise ValueError(f"{path} adapts no layer.")
    if biased := next((name for name in others if name.endswith(".lora_B.bias")), None):
        raise ValueError(
            f"{path}: {biased!r} is a bias on B (variant='lora_bias'), so the update is not B·A alone. Merge it into its base instead, if"
            " the layer has a bias there; if it has none, there is nothing to merge that into: serve the adapter by itself."
        )
    for fqn, layer in layers.items():
        A, B = layer.tensors["A"], layer.tensors["B"]
        if "magnitude_vector" in layer.tensors:
            raise ValueError(f"{path}: {fqn!r} is a DoRA layer, whose update is not B·A alone; merge it into its base instead.")
        if adapter.fields.get("target_parameters") and A.shape[0] not in _ranks(adapter.fields, fqn):
            raise ValueError(f"{path}: {fqn!r} has a pair for each expert (target_parameters), which is not supported here.")
        if ".base_layer." in fqn:
            raise ValueError(f"{path}: {fqn!r} is inside an attention module that shares its rank with it, which is not supported here.")
        if A.shape[0] != B.shape[1]:
            raise ValueError(f"{path}: {fqn!r} is a grouped convolution, which has a pair for each group; not supported here.")
    return Pairs(path, adapter, layers, others)


def _ranks(fields: dict[str, Any], fqn: str) -> set[int]:
    """Return the ranks that the JSON may mean for a layer, which PEFT's patterns name by itself or by its weight. Experts have E·r rows."""
    return {pattern_value(fields.get("rank_pattern"), name, fields.get("r", 8)) for name in (fqn, f"{fqn}.weight")}


def write_pairs(source: Pairs, pairs: Mapping[str, tuple[Tensor, Tensor]], out: str | Path, overwrite: bool) -> Path:
    """Write a folder whose update of every layer is B·A.

    Args:
        source: gives everything else: other tensors, fields, the base's identity, dtype of the factors.
        pairs: FQN → B (out, r) and A (r, in), as matrices, of layers of the source.
        out: the new folder.
        overwrite: replace the adapter in a folder that is not empty.
    """
    out = Path(out)
    check_free(out, overwrite)
    tensors = {name: source.adapter.tensors[name] for name in source.others}
    ranks = {}
    for fqn, (B, A) in pairs.items():
        layer = source.layers[fqn]
        ranks[fqn] = A.shape[0]
        for part, matrix in (("A", A), ("B", B)):
            like = layer.tensors[part]
            shape = (A.shape[0], *like.shape[1:]) if part == "A" else (like.shape[0], A.shape[0], *like.shape[2:])
            name = f"{fqn}.lora_embedding_{part}" if layer.embedding else f"{fqn}.lora_{part}.weight"
            tensors[PREFIX + name] = matrix.reshape(shape).to(like.dtype).contiguous()
    rank = max(ranks.values(), key=list(ranks.values()).count)  # the most frequent one: the fewest patterns
    patterns = {fqn: own for fqn, own in sorted(ranks.items()) if own != rank}
    adapter = source.adapter
    words = {anchored(fqn): own for fqn, own in patterns.items()}
    fields: dict[str, Any] = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": words, "alpha_pattern": words}
    fields |= {"init_lora_weights": True}
    config = adapter.config
    if config is not None:
        mine = {exactly(fqn): own for fqn, own in patterns.items()}
        alphas = {name: float(own) for name, own in mine.items()}
        if _names_slices(config, pairs):  # the result is on whole layers
            config = replace(config, target_modules=[exactly(fqn) for fqn in sorted(pairs)], exclude_modules=(), layers=None)
        config = replace(config, rank=rank, alpha=float(rank), scaling="standard", init="kaiming", rank_pattern=mine, alpha_pattern=alphas)
    made = replace(adapter, tensors=tensors, fields=adapter.fields | fields, config=config)
    text = (json.dumps(made.fields, indent=2, sort_keys=True) + "\n").encode()
    with commit(out, CONFIG, lambda: check_free(out, overwrite)) as staged:
        write_atomic(staged / TENSORS, encoded(made))
        write_atomic(staged / CONFIG, text)
    return out


def _names_slices(config: LoRAConfig, layers: Collection[str]) -> bool:
    """Return whether a config means slices of some of these layers, which then are fused projections."""
    slices = {f"x.{name}" for name in (*QKV, *GATE_UP)} - {f"x.{fqn.rpartition('.')[2]}" for fqn in layers}
    if any(pattern.matches(name) for pattern in compile_patterns(config.exclude_modules, "exclude_modules") for name in slices):
        return True
    named = [] if config.target_modules == ALL_LINEAR else compile_patterns(config.target_modules, "target_modules")
    return bool(named) and not all(any(pattern.matches(fqn) for pattern in named) for fqn in layers)
