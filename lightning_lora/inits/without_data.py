"""Fill A and B with random numbers, or from the base's weight. No data are read."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.filling import fill_factors, fill_random, weight_matrix
from lightning_lora.layers.whole_factors import check_pairs, check_whole
from lightning_lora.registry import freezes, keeps_start, register_init

if TYPE_CHECKING:
    from lightning_lora.layers.base import LoRALayer
    from lightning_lora.layers.spec import LayerSpec


@register_init("kaiming")
def kaiming(layer: LoRALayer) -> None:
    """Fill one factor uniformly in ±1/√fan_in (Kaiming with a = √5, the default of ``nn.Linear``), the other with zeros."""
    fill_random(layer)


@register_init("gaussian")
def gaussian(layer: LoRALayer) -> None:
    """Fill one factor from a normal distribution with standard deviation 1/r, the other with zeros. PEFT's ``"gaussian"`` is the same."""
    random, zero = layer.lora_factors()
    nn.init.normal_(random, std=1 / layer.rank)
    nn.init.zeros_(zero)


def _splits_in_halves(module: Any, spec: LayerSpec, A: tuple[int, ...], B: tuple[int, ...]) -> None:
    check_pairs(module, spec, A, B, "init='orthogonal'")
    if spec.rank % 2:
        raise ValueError(f"init='orthogonal' needs an even rank, here rank={spec.rank}; choose another rank or init")


@register_init("orthogonal", check=_splits_in_halves)
def orthogonal(layer: LoRALayer) -> None:
    """Fill A and B with random values in orthogonal subspaces of the r dimensions (as in PEFT). So B·A = 0.

    r must be even. Layers with groups or a padding row are refused.
    """
    r = layer.rank
    draw = partial(torch.randn, dtype=layer.lora_A.dtype, device="cpu")  # the default dtype may be half precision, which has no QR
    Q, _ = torch.linalg.qr(draw(r, r))
    A = Q[0::2].t() @ draw(r // 2, layer.lora_A[0].numel()) / 10
    B = draw(layer.lora_B.shape[0], r // 2) @ Q[1::2] / 10
    fill_factors(layer, A, B)


@register_init("pissa")
@keeps_start
def pissa(layer: LoRALayer) -> None:
    """Set s·B·A to the weight's truncated singular value decomposition, its principal part (PiSSA, arXiv:2404.02948, eq. 2 and 3)."""
    if not layer.lora_A.is_meta:
        U, S, Vh = torch.linalg.svd(_matrix(layer), full_matrices=False)
        _fill_principal(layer, U, S, Vh)


@register_init("pissa_niter_[n]")
@keeps_start
def pissa_niter(layer: LoRALayer) -> None:
    """Fill as :func:`pissa`, by a randomized decomposition with n subspace iterations. It takes seconds instead of minutes."""
    if not layer.lora_A.is_meta:
        U, S, V = torch.svd_lowrank(_matrix(layer), layer.rank, niter=int(layer.lora_config.init.rpartition("_")[2]))
        _fill_principal(layer, U, S, V.t())


@register_init("olora")
@keeps_start
def olora(layer: LoRALayer) -> None:
    """Fill from the weight's QR decomposition: the first r columns of Q and rows of R (OLoRA, arXiv:2406.01775, section 3)."""
    if not layer.lora_A.is_meta:
        Q, R = torch.linalg.qr(_matrix(layer))
        fill_factors(layer, R[: layer.rank], Q[:, : layer.rank])


def _fits_in_weight(module: Any, spec: LayerSpec, A: tuple[int, ...], B: tuple[int, ...]) -> None:
    check_whole(module, spec, A, B, "init='mica'")


@register_init("mica", check=_fits_in_weight)
@freezes("lora_B")
def mica(layer: LoRALayer) -> None:
    """Fill B with the weight's left singular vectors of the smallest singular values, and freeze it; A is zero (MiCA, arXiv:2604.01694)."""
    nn.init.zeros_(layer.lora_A)
    if not layer.lora_A.is_meta:
        U, _, _ = torch.linalg.svd(_matrix(layer), full_matrices=False)
        fill_factors(layer, torch.zeros(layer.rank, layer.lora_A[0].numel()), U[:, -layer.rank :])


def _matrix(layer: LoRALayer) -> Tensor:
    return weight_matrix(layer, f"init={layer.lora_config.init!r}")


def _fill_principal(layer: LoRALayer, U: Tensor, S: Tensor, Vh: Tensor) -> None:
    root = (S[: layer.rank] / layer.scaling).sqrt()
    fill_factors(layer, root.unsqueeze(1) * Vh[: layer.rank], U[:, : layer.rank] * root)
