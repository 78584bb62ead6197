"""Tensor-parallel linears, computed on the local shards.

Column-parallel: W and B are ``Shard(0)``, A and x replicated. Each rank computes its columns of the output.
Row-parallel: W and A are ``Shard(1)``, x is ``Shard(-1)``, B replicated. Each rank computes a partial sum of every output, which is
reduced together with the base's own.

So the update needs no collective in the forward pass. The backward pass needs one, for the gradient of the replicated factor: each
rank has a partial sum of it. Operations on DTensors give the same numbers. But they choose a placement for each result, which on small
layers takes longer than the computation.
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
    """Return the output as the base would leave it: a DTensor sharded by columns, or of partial sums.

    None if x, W and the factors do not have the placements above.

    Args:
        layer: a linear with a plain update.
        x: a DTensor (..., in).
    """
    from torch.distributed.tensor import DTensor, Partial, Shard

    weight, bias, last = layer.weight, layer.bias, x.ndim - 1
    A, B = layer.update_factors()
    for tensor in (weight, x, A, B):
        if not is_sharded(tensor) or tensor.device_mesh.ndim != 1:
            return None
    (of_W,), (of_x,), (of_A,), (of_B,) = weight.placements, x.placements, A.placements, B.placements
    colwise = of_W.is_shard(0)
    if colwise:
        fits = of_x.is_replicate() and of_A.is_replicate() and of_B.is_shard(0)
        fits = fits and (bias is None or (is_sharded(bias) and bias.placements[0].is_shard(0)))
    else:  # the base adds the bias after the sum
        fits = bias is None and of_W.is_shard(1) and of_x.is_shard(last) and of_A.is_shard(1) and of_B.is_replicate()
    if not fits or weight.requires_grad or layer.dropout_now():  # only DTensor operations draw the same dropout mask on all ranks
        return None
    if x.dtype != weight.dtype and autocast_dtype(x) is None:
        return None
    by_columns = Shard(last)
    local, W = x.to_local(grad_placements=[Partial() if colwise else by_columns]), weight.to_local()
    factors, b = (_local_shard(A), _local_shard(B)), None if bias is None else bias.to_local()
    if backends.worth_kernels(local):
        (y,) = lora_linears(local, [W], [b], factors[:1], factors[1:], [layer.scaling])
    else:
        rows = local.reshape(-1, local.shape[-1])  # two-dimensional, so that the update can be added in place
        y = low_rank.lora_update(F.linear(rows, W, b), rows, *factors, layer.scaling, inplace=True)
        y = y.view(*local.shape[:-1], y.shape[-1])
    if y.requires_grad and not torch.compiler.is_compiling():
        y.register_hook(_first_derivative)
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return DTensor.from_local(
        y, weight.device_mesh, [by_columns if colwise else Partial()], run_check=False, shape=shape, stride=tuple(reversed(strides))
    )


def _local_shard(factor: Any) -> Tensor:
    """Return the local shard of a factor. The gradient of a replicated factor is summed over the ranks."""
    from torch.distributed.tensor import Partial

    if not factor.placements[0].is_replicate():
        shard: Tensor = factor.to_local()
        return shard
    replica: Tensor = factor.redistribute(placements=factor.placements).to_local(grad_placements=[Partial()])
    return replica


def _first_derivative(grad: Tensor) -> None:
    """Refuse second derivatives: the collectives of the backward pass are not differentiable.

    Raises:
        RuntimeError: second derivatives are requested, or several gradients at once.
    """
    if wants_definition(grad):
        raise RuntimeError(
            "second derivatives (create_graph=True) and vectorized Jacobians are not available under tensor parallelism: compute them on a"
            " model that is not sharded."
        )
