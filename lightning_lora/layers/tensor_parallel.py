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

from lightning_lora.ops import backends, low_rank
from lightning_lora.ops.fused_linear import lora_linears
from lightning_lora.ops.second_derivatives import wants_definition
from lightning_lora.utils.autocast import autocast_dtype
from lightning_lora.utils.sharding import is_sharded


def local_forward(layer: Any, x: Any) -> Tensor | None:
    """The output as the base would leave it, a DTensor of columns or of shares; None if x, W and the factors do not lie as said above.

    Args:
        layer: a linear with a plain update.
        x: a DTensor (..., in).
    """
    from torch.distributed.tensor import DTensor, Partial, Shard

    weight, bias, factors, last = layer.weight, layer.bias, layer.update_factors(), x.ndim - 1
    tensors = [weight, x, *factors, *([] if bias is None else [bias])]
    if not all(map(is_sharded, tensors)) or any(tensor.device_mesh.ndim != 1 for tensor in tensors) or weight.requires_grad:
        return None
    cut, mine, A, B, *own = (tensor.placements[0] for tensor in tensors)
    colwise = cut.is_shard(0)
    if colwise:
        alike = mine.is_replicate() and A.is_replicate() and B.is_shard(0) and all(place.is_shard(0) for place in own)
    else:  # a bias is added to the sum, by the base
        alike = cut.is_shard(1) and mine.is_shard(last) and A.is_shard(1) and B.is_replicate() and not own
    same = x.dtype == weight.dtype or autocast_dtype(x) is not None
    if not (alike and same) or layer.dropout_now():  # dropout's mask is what DTensors keep alike on all ranks
        return None
    piece, W = x.to_local(grad_placements=[Partial() if colwise else Shard(last)]), weight.to_local()
    (low, high), b = map(_piece, factors), None if bias is None else bias.to_local()
    if torch.compiler.is_compiling() and not backends.usable(piece):  # it fuses the definition itself
        y = low_rank.lora_update(F.linear(piece, W, b), piece, low, high, layer.scaling)
    else:
        (y,) = lora_linears(piece, [W], [b], [low], [high], [layer.scaling])
    if y.requires_grad and not torch.compiler.is_compiling():
        y.register_hook(_first_derivative)
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    strides = torch.empty(shape, device="meta").stride()
    placement = Shard(last) if colwise else Partial()
    return DTensor.from_local(y, weight.device_mesh, [placement], run_check=False, shape=shape, stride=strides)


def _piece(factor: Any) -> Tensor:
    """This rank's piece; of a factor that is whole, the gradient is summed over the ranks."""
    from torch.distributed.tensor import Partial

    if not factor.placements[0].is_replicate():
        piece: Tensor = factor.to_local()
        return piece
    whole: Tensor = factor.redistribute(placements=factor.placements).to_local(grad_placements=[Partial()])
    return whole


def _first_derivative(grad: Tensor) -> None:
    """What crosses between ranks has no derivative of its own.

    Raises:
        RuntimeError: second derivatives are asked for, or many gradients at once.
    """
    if wants_definition(grad):
        raise RuntimeError(
            "second derivatives (create_graph=True) and vectorized Jacobians are not to be had under tensor parallelism: take them on a"
            " model that is not split."
        )
