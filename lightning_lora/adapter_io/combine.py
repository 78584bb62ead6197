"""Several adapters of one base as one: ``combine_adapters``; one adapter at a lower rank: ``compress_adapter``. Both on files alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_lora.adapter_io.file_arithmetic import Pairs, read_pairs, write_pairs
from lightning_lora.adapter_io.fingerprint import PACKED, same_base
from lightning_lora.ops.low_rank_svd import balanced, check_energy, rank_for_energy, svd_of_product
from lightning_lora.ops.task_vectors import RULES, Majority, Sparsity
from lightning_lora.utils.patterns import exactly

METHODS = ("cat", "svd", *RULES, *(f"{name}_svd" for name in RULES if name != "linear"))
_Part = tuple[float, float, Tensor, Tensor]  # weight, scaling, A (r, in), B (out, r)


def combine_adapters(
    adapters: Mapping[str, float] | Mapping[Path, float],
    out: str | Path,
    *,
    method: str = "svd",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority: Majority = "total",
    seed: int = 0,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
) -> Path:
    """Write one adapter folder that adds several adapters of one base, each with a weight: ``ΔW = Σ wᵢ·sᵢ·Bᵢ·Aᵢ``.

    A layer that some adapters do not have counts as zero there. The methods are PEFT's, under its names:

    - ``cat``: exact. The rank is the sum of the ranks.
    - ``svd``: the best approximation of that sum at a lower rank, from the factors alone.
    - ``linear``: adds A's and B's, each with √(w·s). Cheap and rough: it adds products of one adapter's B and another's A.
    - ``ties``, ``dare_linear``, ``dare_ties``, ``magnitude_prune``: the papers' rules on the A's and on the B's
      (:mod:`lightning_lora.ops.task_vectors`); with ``_svd`` on the dense updates, which are then truncated.

    Args:
        adapters: folder → weight; a negative weight subtracts.
        out: the new folder.
        method: one of the above.
        rank: of the result, for the methods with ``svd``; default: the largest of the adapters'.
        energy: in place of ``rank``: the share of ``‖ΔW‖²`` that each layer keeps, in (0, 1].
        density: the share of entries that ``ties``, ``dare_*`` and ``magnitude_prune`` keep, in (0, 1].
        majority: how TIES elects signs: ``total`` (sum of the entries) or ``frequency`` (their number).
        seed: of what DARE drops.
        device: where to compute. Dense updates of a large model are slow on a CPU.
        overwrite: replace the adapter in a folder that is not empty.

    Returns:
        The new folder.

    Raises:
        ValueError: an option is out of range, the adapters are not of one base or shape, a layer's update is not one B·A (DoRA, VeRA), or
            they trained other tensors that differ.

    Examples:
        >>> folder = combine_adapters({"runs/legal/adapter": 0.7, "runs/polite/adapter": 0.3}, "both", method="cat")
        >>> model = load_adapter(model, folder)
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose one of {', '.join(METHODS)}.")
    if not isinstance(adapters, Mapping) or len(adapters) < 2:
        raise ValueError(
            f"adapters={adapters!r}: give a dict of two or more folders, each with a weight; compress_adapter makes one smaller."
        )
    for folder, weight in adapters.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight == 0:
            raise ValueError(f"adapters[{str(folder)!r}]={weight!r}: a weight is a finite number other than 0.")
    sparse = method.removesuffix("_svd") in RULES and method != "linear"
    if sparse != (density is not None):
        raise ValueError(
            f"density={density!r}: {method} needs one in (0, 1]." if sparse else f"density={density!r}: {method} drops nothing."
        )
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density={density!r}: give a share in (0, 1].")
    if majority not in get_args(Majority):
        raise ValueError(f"majority={majority!r}: choose one of {', '.join(get_args(Majority))}.")
    if not method.endswith("svd") and (rank, energy) != (None, None):
        raise ValueError(f"{f'rank={rank}' if rank else f'energy={energy}'}: {method} chooses the rank itself; use a method with svd.")
    _check_size(rank, energy)
    given = [(read_pairs(folder), float(weight)) for folder, weight in adapters.items()]
    source = _united([pairs for pairs, _ in given])
    sparsity = Sparsity(density or 1.0, torch.Generator(device).manual_seed(seed), majority)
    size = rank or (None if energy else max(layer.rank for layer in source.layers.values()))
    made = {}
    for fqn in source.layers:
        parts: list[_Part] = []
        for pairs, weight in given:
            if (layer := pairs.layers.get(fqn)) is not None:
                parts.append((weight, layer.scaling, _matrix(layer.tensors["A"], device), _matrix(layer.tensors["B"], device)))
        B, A = _combined(method, parts, sparsity, size, energy, fqn)
        made[fqn] = B.cpu(), A.cpu()
    return write_pairs(source, made, out, overwrite)


def compress_adapter(
    adapter: str | Path, out: str | Path, *, rank: int | None = None, energy: float | None = None, overwrite: bool = False
) -> Path:
    """Write an adapter at a lower rank: each layer's truncated singular value decomposition, computed from its factors.

    Args:
        adapter: the folder to read, ours or PEFT's.
        out: the new folder.
        rank: of every layer; layers of a lower rank keep theirs.
        energy: in place of ``rank``: the share of ``‖ΔW‖²`` that each layer keeps, in (0, 1]. Each layer gets the rank that takes.
        overwrite: replace the adapter in a folder that is not empty.

    Returns:
        The new folder.

    Raises:
        ValueError: not one of ``rank`` and ``energy`` is given, one is out of range, or a layer's update is not one B·A (DoRA, VeRA).

    Examples:
        >>> folder = compress_adapter("runs/legal/adapter", "small", energy=0.9)
        >>> model = load_adapter(model, folder)
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"rank={rank}, energy={energy}: give one of them.")
    _check_size(rank, energy)
    source = read_pairs(adapter)
    made = {}
    for fqn, layer in source.layers.items():
        A, B = (_matrix(layer.tensors[part], "cpu") for part in "AB")
        made[fqn] = _truncated(svd_of_product(layer.scaling * B, A), rank, energy)
    return write_pairs(source, made, out, overwrite)


def _check_size(rank: int | None, energy: float | None) -> None:
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank={rank!r}: the rank is a whole number ≥ 1, such as 8.")
    if energy is not None:
        check_energy(energy)
    if rank is not None and energy is not None:
        raise ValueError(f"rank={rank}, energy={energy}: give one of them.")


def _matrix(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Return a factor as a matrix in float64. A convolution's has dimensions of its kernel behind the second."""
    return tensor.flatten(1).to(device, torch.float64)


def _combined(
    method: str, parts: list[_Part], sparsity: Sparsity, rank: int | None, energy: float | None, fqn: str
) -> tuple[Tensor, Tensor]:
    """Return B and A of one layer."""
    if method in ("cat", "svd"):
        A, B = torch.cat([A for _, _, A, _ in parts]), torch.cat([weight * scaling * B for weight, scaling, _, B in parts], 1)
        return (B, A) if method == "cat" else _truncated(svd_of_product(B, A), rank, energy)
    rule = RULES[method.removesuffix("_svd")]
    if method.endswith("_svd"):
        dense = rule([scaling * B @ A for _, scaling, A, B in parts], [weight for weight, *_ in parts], sparsity)
        return _truncated(torch.linalg.svd(dense, full_matrices=False), rank, energy)
    ranks = [A.shape[0] for _, _, A, _ in parts]
    if len(set(ranks)) > 1:
        raise ValueError(f"method={method!r} adds factors of one rank; {fqn!r} has {ranks}. Use cat, or a method with svd.")
    # The sign goes to A alone: on both it would cancel.
    roots = [math.sqrt(abs(weight * scaling)) for weight, scaling, *_ in parts]
    signed = [math.copysign(root, weight * scaling) for root, (weight, scaling, *_) in zip(roots, parts, strict=True)]
    A = rule([A for *_, A, _ in parts], signed, sparsity)
    return rule([B for *_, B in parts], roots, sparsity), A


def _truncated(decomposition: tuple[Tensor, Tensor, Tensor], rank: int | None, energy: float | None) -> tuple[Tensor, Tensor]:
    U, S, Vh = decomposition
    return balanced(U, S, Vh, rank_for_energy(S, energy) if rank is None else min(rank, len(S)))  # type: ignore[arg-type]


def _united(given: list[Pairs]) -> Pairs:
    """Return the first adapter with the layers of all.

    Raises:
        ValueError: they are of different bases, adapt a layer in different shapes, or have other tensors that differ.
    """
    first = given[0]
    layers = dict(first.layers)
    base, base_of = first.adapter.base, first
    for other in given[1:]:
        _check_others(first, other)
        if base is None:
            base, base_of = other.adapter.base, other
        elif other.adapter.base is not None and base.get(PACKED) != other.adapter.base.get(PACKED):
            raise ValueError(
                f"{other.path} belongs to quantized weights ({other.adapter.base.get(PACKED)}), {base_of.path} to {base.get(PACKED)}: an"
                " adapter with init='loftq' makes up for what quantizing lost, and can be added to others of the same quantized base only."
            )
        elif other.adapter.base is not None and same_base(base, other.adapter.base) is False:
            raise ValueError(
                f"{other.path} was trained on another base than {base_of.path}: fingerprint {other.adapter.base['fingerprint']}, not"
                f" {base['fingerprint']}. Adapters of two bases cannot be added."
            )
        for fqn, layer in other.layers.items():
            mine = layers.setdefault(fqn, layer)
            shapes = [(each.tensors["A"].shape[1:], each.tensors["B"].shape[::2], each.embedding) for each in (mine, layer)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{other.path}: {fqn!r} has A and B of other shapes than in {first.path}: another base.")
    configs = [pairs.adapter.config for pairs in given]
    adapter = replace(first.adapter, base=base, fields=first.adapter.fields | _targets(given, layers))
    if None in configs or first.adapter.config is None:  # the JSON counts, as in PEFT's own files
        adapter = replace(adapter, config=None)
    elif any(_choice(config) != _choice(configs[0]) for config in configs):
        exact = [exactly(fqn) for fqn in sorted(layers)]
        adapter = replace(adapter, config=replace(first.adapter.config, target_modules=exact, exclude_modules=(), layers=None))
    return Pairs(first.path, adapter, layers, first.others)


def _check_others(first: Pairs, other: Pairs) -> None:
    mine, theirs = ({name: pairs.adapter.tensors[name] for name in pairs.others} for pairs in (first, other))
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs or not torch.equal(mine[name], theirs[name]):
            raise ValueError(
                f"{other.path}: {name!r} was trained in full (modules_to_save, token rows or a bias) and differs from that of {first.path}."
                " Only low-rank updates can be added; merge one adapter into the base first."
            )


def _choice(config: Any) -> Any:
    """Return the fields of a config that choose layers."""
    return config.target_modules, config.exclude_modules, config.layers


def _targets(given: list[Pairs], layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return PEFT's fields that choose layers: the adapters' own if they agree, else the layers by name."""
    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    said = [[pairs.adapter.fields.get(name) for name in names] for pairs in given]
    if all(fields == said[0] for fields in said):
        return {}
    there = given[0].adapter.fields
    return {"target_modules": sorted(layers)} | {name: None for name in names[1:] if name in there}
