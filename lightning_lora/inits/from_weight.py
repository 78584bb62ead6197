"""Compute A and B from the base's weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.filling import fill_factors, weight_matrix
from lightning_lora.layers.whole_factors import check_whole
from lightning_lora.registry import freezes, keeps_start, register_init

if TYPE_CHECKING:
    from lightning_lora.layers.base import LoRALayer
    from lightning_lora.layers.spec import LayerSpec


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
