"""What a trained adapter did to each layer: size and spectrum of its update, gradients of A and B. Never a dense update.

The numbers are those of ``s·B·A``. DoRA's magnitude, LoRA's bias on B and an embedding's scale change the output beside it and are not in
them. A layer with several products (experts, groups of a convolution, slices of a fused projection) has the norm of all of them; its
ranks are averages over those that are not zero, its spectrum is the root mean square over all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.ops.spectrum import effective_rank, gram_matrices, singular_values, stable_rank
from lightning_lora.quantization.formats import dequantized, format_of
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.sharding import is_sharded, squared_norms


class Spectrum(NamedTuple):
    """One layer's update.

    Attributes:
        norm: ‖s·B·A‖, Frobenius.
        stable_rank: ``Σ σ² / σ₁²``.
        effective_rank: exponential of the entropy of ``σ / Σ σ``.
        values: singular values, (k,), descending; k is the adapter's rank, or twice that if it keeps its start.
    """

    norm: float
    stable_rank: float
    effective_rank: float
    values: Tensor


class Gradients(NamedTuple):
    """Norms of one layer's gradients, NaN where there is none.

    Attributes:
        A: of ``lora_A``.
        B: of ``lora_B``.
        all: of all that trains in the adapter, such as DoRA's magnitude and LoRA-XS's core.
    """

    A: float
    B: float
    all: float


def low_rank_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return name → layer of everything that has factors. Several weights of one module have the weight's name appended."""
    return {name: part for name, (_, part) in _parts(model).items()}


def owners_of(model: nn.Module) -> dict[str, str]:
    """Return name, as :func:`low_rank_layers` gives it, → name of the module."""
    return {name: owner for name, (owner, _) in _parts(model).items()}


def _parts(model: nn.Module) -> dict[str, tuple[str, LoRALayer]]:
    found = {}
    for name, layer in ((clean_name(long), layer) for long, layer in lora_layers(model)):
        for weight, part in layer.by_weight().items():
            if part.low_rank:
                found[name if part is layer else f"{name}.{weight}"] = name, part
    return found


@torch.no_grad()
def spectra(layers: Mapping[str, LoRALayer]) -> dict[str, Spectrum]:
    """Measure the update of each layer.

    Costs 2·r²·(in + out) + 4·r³ floating-point operations a layer, and a decomposition of r × r. A collective on sharded layers,
    which gathers A and B.
    """
    grams: list[tuple[str, Tensor, Tensor]] = []
    for name, layer in layers.items():
        grams += [(name, *gram_matrices(A, B)) for A, B in layer.exact_pairs()]
    values: dict[str, list[Tensor]] = {name: [] for name in layers}
    by_size: dict[tuple[int, torch.device], list[tuple[str, Tensor, Tensor]]] = {}
    for each in grams:
        by_size.setdefault((each[1].shape[-1], each[1].device), []).append(each)
    for (rank, _), group in by_size.items():
        G_A, G_B = (torch.cat([each[part].reshape(-1, rank, rank) for each in group]) for part in (1, 2))  # type: ignore[union-attr]
        sizes = [each[1].shape[:-2].numel() for each in group]
        for (name, *_), S in zip(group, singular_values(G_A, G_B).split(sizes), strict=True):
            values[name].append(S)
    return {name: _spectrum(torch.cat(values[name]) * layer.scaling) for name, layer in layers.items()}


def _spectrum(S: Tensor) -> Spectrum:
    """Summarize the singular values of a layer's products, (n, k)."""
    used = S[S.amax(-1) != 0]
    stable, effective = (float(rank(used).mean()) if len(used) else 0.0 for rank in (stable_rank, effective_rank))
    return Spectrum(float(S.square().sum().sqrt()), stable, effective, S.square().mean(0).sqrt())


def weight_norms(layers: Mapping[str, LoRALayer]) -> dict[str, float]:
    """Return ‖W‖ of each layer's frozen weight; NaN for a quantized weight that is sharded, which no process can read.

    Weights are read one by one, a quantized one is dequantized for that. A collective on sharded layers.
    """
    found = dict.fromkeys(layers, math.nan)
    plain = {name: layer.weight for name, layer in layers.items() if format_of(layer) is None}
    for name, layer in layers.items():
        if name not in plain and not is_sharded(layer.weight):
            found[name] = math.sqrt(squared_norms([dequantized(layer)])[0])
    squares = squared_norms(list(plain.values())) if plain else torch.empty(0)
    return found | {name: math.sqrt(square) for name, square in zip(plain, squares.tolist(), strict=True)}


def gradient_norms(layers: Mapping[str, LoRALayer], factor: float = 1.0) -> dict[str, Gradients]:
    """Return the norms of each layer's gradients; a collective on sharded layers.

    Args:
        layers: name → layer.
        factor: what the norms are multiplied by, such as the inverse of a loss scale.
    """
    parts = [(name, short, p.grad) for name, layer in layers.items() for short, p in layer.lora_parameters().items() if p.grad is not None]
    values = squared_norms([gradient for *_, gradient in parts]).tolist() if parts else []
    squares: dict[str, dict[str, float]] = {name: {} for name in layers}
    for (name, short, _), square in zip(parts, values, strict=True):
        squares[name][short] = square

    def norm(square: float) -> float:
        return math.sqrt(square) * factor

    nan = math.nan
    return {
        name: Gradients(norm(own.get("lora_A", nan)), norm(own.get("lora_B", nan)), norm(sum(own.values()) if own else nan))
        for name, own in squares.items()
    }
