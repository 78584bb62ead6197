"""How A and B start, without reading data. Each function fills the factors of one layer; the layer says which is which.

An adapted model starts as its base. Most inits see to that by B·A = 0. Those that take A and B from the weight are marked
:func:`~lightning_lora.registry.keeps_start`: the layer then keeps the start B₀·A₀ and adds ``s·(B·A − B₀·A₀)``. Papers and PEFT take
s·B₀·A₀ out of the base weight, which is the same sum; here the base stays as it is, to the bit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_lora.registry import keeps_start, register_init
from lightning_lora.utils.sharding import full_tensor, local_shard, local_tensor

if TYPE_CHECKING:
    from lightning_lora.layers.base import LoRALayer


@register_init("kaiming")
def kaiming(layer: LoRALayer) -> None:
    """Uniform in ±1/√fan_in (Kaiming with a = √5, what ``nn.Linear`` starts with), the other factor zero."""
    random, zero = layer.lora_factors()
    nn.init.kaiming_uniform_(random, a=math.sqrt(5))
    nn.init.zeros_(zero)


@register_init("gaussian")
def gaussian(layer: LoRALayer) -> None:
    """Normal with standard deviation 1/r, the other factor zero (as PEFT's ``init_lora_weights="gaussian"``)."""
    random, zero = layer.lora_factors()
    nn.init.normal_(random, std=1 / layer.rank)
    nn.init.zeros_(zero)


@register_init("orthogonal")
def orthogonal(layer: LoRALayer) -> None:
    """A and B both random, in subspaces of the r dimensions that are orthogonal, so that B·A = 0; r is even (as in PEFT).

    Raises:
        ValueError: r is odd, or A and B meet in groups.
    """
    r = layer.rank
    if r % 2 or layer.lora_B.shape[1] != r:
        raise ValueError(f"init='orthogonal' needs an even rank and no groups, here rank={r}; choose another rank or init")
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    A = Q[0::2].t() @ torch.randn(r // 2, layer.lora_A[0].numel()) / 10
    B = torch.randn(layer.lora_B.shape[0], r // 2) @ Q[1::2] / 10
    _fill(layer, A, B)


@register_init("pissa")
@keeps_start
def pissa(layer: LoRALayer) -> None:
    """The principal part of the weight: s·B·A is its truncated singular value decomposition (PiSSA, arXiv:2404.02948, eq. 2 and 3)."""
    if not layer.lora_A.is_meta:
        U, S, Vh = torch.linalg.svd(_matrix(layer), full_matrices=False)
        _fill_principal(layer, U, S, Vh)


@register_init("pissa_niter_4")
@keeps_start
def pissa_niter_4(layer: LoRALayer) -> None:
    """As :func:`pissa`, by a randomized decomposition with 4 subspace iterations, which takes seconds where that takes minutes."""
    if not layer.lora_A.is_meta:
        U, S, V = torch.svd_lowrank(_matrix(layer), layer.rank, niter=4)
        _fill_principal(layer, U, S, V.t())


@register_init("olora")
@keeps_start
def olora(layer: LoRALayer) -> None:
    """The first r columns of Q and rows of R of the weight's QR decomposition (OLoRA, arXiv:2406.01775, section 3)."""
    if not layer.lora_A.is_meta:
        Q, R = torch.linalg.qr(_matrix(layer))
        _fill(layer, R[: layer.rank], Q[:, : layer.rank])


def _matrix(layer: LoRALayer) -> Tensor:
    """The weight, whole and unpacked, as an (out, in) matrix in the factors' dtype.

    Raises:
        ValueError: it cannot be read here.
    """
    if layer.weight.ndim < 2:
        raise ValueError(f"init={layer.lora_config.init!r} reads the weight, which FSDP1 has flattened: apply LoRA before wrapping")
    matrix = layer.to_matrix(full_tensor(layer.base_weight().detach())).to(layer.lora_A.dtype)
    return matrix.flatten(0, -2)  # of a convolution it has the groups, which are one, in front


def _fill_principal(layer: LoRALayer, U: Tensor, S: Tensor, Vh: Tensor) -> None:
    root = (S[: layer.rank] / layer.scaling).sqrt()
    _fill(layer, root.unsqueeze(1) * Vh[: layer.rank], U[:, : layer.rank] * root)


def _fill(layer: LoRALayer, A: Tensor, B: Tensor) -> None:
    """Give the factors the values of these matrices, (r, in) and (out, r)."""
    for factor, value in ((layer.lora_A, A), (layer.lora_B, B)):
        local_tensor(factor).copy_(local_shard(value.reshape(factor.shape), factor))
