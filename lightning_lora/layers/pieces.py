"""Linears that tensor parallelism has cut, computed on this rank's pieces.

Of a W cut by rows (colwise) a rank has its rows and B's, and A and x whole, and computes its columns of the output. Of one cut by columns
(rowwise) it has its columns and A's and x's, and B whole, and computes its share of every output, which is summed with the base's own. So
the update needs no collective in the forward pass, and in the backward pass one, for the gradient of the factor that is whole: each rank
has its share of it. Operations on DTensors give the same numbers, but decide where to put each result, which on small layers takes longer
than computing it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora import kernels, ops
from lightning_lora.autocast import autocast_dtype
from lightning_lora.fused_ops import lora_linears
from lightning_lora.sharding import is_sharded


def cut_alike(layer: Any, x: Tensor) -> bool:
    """Whether a plain update's factors, x and the base weight lie on the ranks as described above."""
    weight, factors = layer.weight, layer.update_factors()
    if not all(map(is_sharded, (x, weight, *factors))) or weight.device_mesh.ndim != 1 or weight.requires_grad:
        return False
    cut, mine, A, B = (tensor.placements[0] for tensor in (weight, x, *factors))
    if cut.is_shard(0):
        alike = mine.is_replicate() and A.is_replicate() and B.is_shard(0)
    else:  # a bias is added to the sum, by the base
        alike = cut.is_shard(1) and mine.is_shard(x.ndim - 1) and A.is_shard(1) and B.is_replicate() and layer.bias is None
    same = x.dtype == weight.dtype or autocast_dtype(x) is not None
    return alike and same and not layer.dropout_now()  # whose mask DTensors keep alike on all ranks


def on_pieces(layer: Any, x: Any) -> Tensor:
    """The output of a layer that is :func:`cut_alike`, as the base would leave it: a DTensor of columns, or of shares."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh, (cut,), last = layer.weight.device_mesh, layer.weight.placements, x.ndim - 1
    colwise = cut.is_shard(0)
    A, B = (_piece(factor) for factor in layer.update_factors())
    piece, weight = x.to_local(grad_placements=[Partial() if colwise else Shard(last)]), layer.weight.to_local()
    bias = None if layer.bias is None else layer.bias.to_local()
    if torch.compiler.is_compiling() and not kernels.usable(piece):  # it fuses the definition itself
        y = ops.lora_update(F.linear(piece, weight, bias), piece, A, B, layer.scaling)
    else:
        (y,) = lora_linears(piece, [weight], [bias], [A], [B], [layer.scaling])
    shape = torch.Size((*x.shape[:-1], layer.weight.shape[0]))
    placement = Shard(last) if colwise else Partial()
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(y, mesh, [placement], run_check=False, shape=shape, stride=strides)


def _piece(factor: Any) -> Tensor:
    """This rank's piece; of a factor that is whole, the gradient is summed over the ranks."""
    from torch.distributed.tensor import Partial

    if not factor.placements[0].is_replicate():
        piece: Tensor = factor.to_local()
        return piece
    whole: Tensor = factor.redistribute(placements=factor.placements).to_local(grad_placements=[Partial()])
    return whole
