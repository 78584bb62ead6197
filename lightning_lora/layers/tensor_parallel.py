"""Tensor-parallel linears, computed on the local shards.

Column-parallel: W and B are ``Shard(0)``, A and x replicated. Each rank computes its columns of the output.
Row-parallel: W and A are ``Shard(1)``, x is ``Shard(-1)``, B replicated. Each rank computes a partial sum of every output, which is
reduced together with the base's own.

So the update needs no collective in the forward pass. The backward pass sums the gradients of x (column-parallel) and of the replicated
factors over the ranks: once for all linears that read one x. Operations on DTensors give the same numbers. But they choose a placement for
each result, which on small layers takes longer than the computation.

Parameters and their gradients stay DTensors: optimizers and checkpoints see what they saw before. The tensors between the linears of a
block are plain (:mod:`lightning_lora.layers.plan_hooks`), or DTensors where a user's plan leaves them so (:func:`local_forward`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops import backends, low_rank
from lightning_lora.ops.fused_linear import lora_linears
from lightning_lora.ops.second_derivatives import wants_definition
from lightning_lora.utils.autocast import autocast_dtype
from lightning_lora.utils.sharding import is_sharded, with_local
from lightning_lora.utils.torch_private import dtensor_storage, transforms_active


class Operands(NamedTuple):
    """What linears multiply on this rank: plain tensors."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    A_list: list[Tensor]
    B_list: list[Tensor]


def local_outputs(layers: list[Any], x: Tensor) -> tuple[Tensor, ...] | None:
    """Return the plain outputs of linears that read the same plain x (..., in): this rank's columns, or the whole of a row-parallel one's.

    None if they cannot be computed on the shards.

    Args:
        layers: linears, all column-parallel, or one that is row-parallel.
        x: the same on every rank; of a row-parallel linear this rank's columns.
    """
    by_columns = [is_by_columns(layer) for layer in layers]
    if len(layers) > 1 and not all(by_columns):
        return None
    operands = enter(layers, x, sum_x=by_columns[0])
    if operands is None:
        return None
    scales = [layer.scaling for layer in layers]
    if by_columns[0]:
        return _products(operands, scales)
    (bias,) = operands.biases  # of a sum over the ranks, so it is added once
    (partial,) = _products(operands._replace(biases=[None]), scales)
    y = leave(partial, layers[0].weight.device_mesh)
    return (y if bias is None else y + bias.to(y.dtype),)


def local_forward(layer: Any, x: Any) -> Tensor | None:
    """Return the output as the base would leave it: a DTensor sharded by columns, or of partial sums.

    None if it cannot be computed on the shards.

    Args:
        layer: a linear with a plain update.
        x: a DTensor (..., in).
    """
    from torch.distributed.tensor import DTensor, Partial, Shard

    if not is_sharded(layer.weight) or x.device_mesh.ndim != 1:
        return None
    last, by_columns = x.ndim - 1, is_by_columns(layer)
    columns = Shard(last)
    if not (x.placements[0].is_replicate() if by_columns else layer.bias is None and x.placements[0].is_shard(last)):
        return None  # the base adds the bias after the sum
    operands = enter([layer], x.to_local(grad_placements=[Partial() if by_columns else columns]), sum_x=False)
    if operands is None:
        return None
    (y,) = _products(operands, [layer.scaling])
    shape = torch.Size((*x.shape[:-1], layer.weight.shape[0]))
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return DTensor.from_local(
        y, layer.weight.device_mesh, [columns if by_columns else Partial()], run_check=False, shape=shape, stride=tuple(reversed(strides))
    )


def is_by_columns(layer: Any) -> bool:
    """True if a layer's weight is split by its rows, which compute columns of the output."""
    return is_sharded(layer.weight) and bool(layer.weight.placements[0].is_shard(0))


def _products(operands: Operands, scales: list[float]) -> tuple[Tensor, ...]:
    """Return each linear's product with its update added."""
    x, weights, biases, A_list, B_list = operands
    if backends.worth_kernels(x) or (len(weights) > 1 and not torch.compiler.is_compiling()):
        return lora_linears(x, weights, biases, A_list, B_list, scales)
    rows = x.reshape(-1, x.shape[-1])  # two-dimensional, so that the update can be added in place
    outputs = []
    for W, bias, A, B, scale in zip(weights, biases, A_list, B_list, scales, strict=True):
        y = low_rank.lora_update(F.linear(rows, W, bias), rows, A, B, scale, inplace=True)
        outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
    return tuple(outputs)


def enter(layers: Sequence[Any], x: Tensor, sum_x: bool) -> Operands | None:
    """Return what linears multiply on this rank, None if one of them cannot be computed on its shards at the moment.

    The gradients of the replicated factors are summed over the ranks.

    Args:
        layers: linears with a plain update.
        x: a plain tensor.
        sum_x: sum the gradient of x too.
    """
    factors: list[Any] = []
    for layer in layers:
        pair = _factors(layer, x)
        if pair is None:
            return None
        factors += pair
    summed = [factor.placements[0].is_replicate() for factor in factors]
    biases = [layer.bias for layer in layers]
    given = [bias for bias in biases if bias is not None]
    factors, summed = factors + given, summed + [False] * len(given)  # whoever adds a whole bias has its whole gradient
    weights, mesh = [layer.weight for layer in layers], layers[0].weight.device_mesh
    if torch.compiler.is_compiling():
        x, *found = _entered_by_dtensors(mesh, x, sum_x, factors, summed)
        weights = [weight.to_local() for weight in weights]
    else:
        x, *found = _Entered.apply(mesh.get_group(), sum_x, summed, x, *factors)
        weights = [dtensor_storage(weight) for weight in weights]
    n = 2 * len(layers)
    rest = iter(found[n:])
    return Operands(x, weights, [None if bias is None else next(rest) for bias in biases], found[0:n:2], found[1:n:2])


def _factors(layer: Any, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return A and B, None if the layer, its placements or x do not fit."""
    weight, bias = layer.weight, layer.bias
    if layer.lora_state.merge is not None or layer.disabled or layer.dropout_now():
        return None  # only DTensor operations draw the same dropout mask on all ranks
    if weight.requires_grad or not low_rank.has_rows(x) or transforms_active() or (x.dtype != weight.dtype and autocast_dtype(x) is None):
        return None
    A, B = layer.update_factors()
    for tensor in (weight, A, B) if bias is None else (weight, A, B, bias):
        if not is_sharded(tensor) or len(tensor.placements) != 1:
            return None
    (of_W,), (of_A,), (of_B,) = weight.placements, A.placements, B.placements
    if of_W.is_shard(0):
        fits = of_A.is_replicate() and of_B.is_shard(0) and (bias is None or bias.placements[0].is_shard(0))
    else:
        fits = of_W.is_shard(1) and of_A.is_shard(1) and of_B.is_replicate() and (bias is None or bias.placements[0].is_replicate())
    return (A, B) if fits else None


class _Entered(torch.autograd.Function):
    """x, and the local shards of DTensors. The backward pass sums over the ranks what each rank has a part of."""

    @staticmethod
    def forward(ctx: Any, group: Any, sum_x: bool, summed: list[bool], x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.sum_x, ctx.summed, ctx.factors = group, sum_x, summed, factors
        ctx.set_materialize_grads(False)
        return (x.view_as(x), *[dtensor_storage(factor).detach() for factor in factors])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        dx, *found = grads
        _refuse_second_derivative(next((grad for grad in grads if grad is not None), None))
        if dx is not None and ctx.sum_x:
            dx = dx.contiguous()  # has no other user, since x was used by the linears only
            dist.all_reduce(dx, group=ctx.group)
        parts = [(k, grad) for k, (grad, sums) in enumerate(zip(found, ctx.summed, strict=True)) if sums and grad is not None]
        if parts:  # in one collective
            flat = torch.cat([grad.reshape(-1) for _, grad in parts])
            dist.all_reduce(flat, group=ctx.group)
            for (k, grad), whole in zip(parts, flat.split([grad.numel() for _, grad in parts]), strict=True):
                found[k] = whole.view(grad.shape)
        gradients = [None if grad is None else with_local(grad, factor) for grad, factor in zip(found, ctx.factors, strict=True)]
        return None, None, None, dx, *gradients


def _entered_by_dtensors(mesh: Any, x: Tensor, sum_x: bool, factors: list[Any], summed: list[bool]) -> list[Tensor]:
    """Compute the same with operations on DTensors: a compiler chooses placements once, when it traces."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if sum_x:
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
    found = [x]
    for factor, sums in zip(factors, summed, strict=True):
        if sums:  # the backward pass of this brings the gradient, a sum of parts, to the factor's placement
            found.append(factor.redistribute(placements=factor.placements).to_local(grad_placements=[Partial()]))
        else:
            found.append(factor.to_local())
    return found


def leave(partial: Tensor, mesh: Any) -> Tensor:
    """Return the sum of the ranks' partial outputs. The partial output must have no other user: it may be overwritten."""
    if torch.compiler.is_compiling():
        from torch.distributed.tensor import DTensor, Partial, Replicate

        whole: Tensor = DTensor.from_local(partial, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()
        return whole
    y: Tensor = _Left.apply(partial, mesh.get_group())
    return y


class _Left(torch.autograd.Function):
    """The sum over the ranks. Every rank has its whole gradient."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Any) -> Tensor:
        partial = partial.contiguous()
        dist.all_reduce(partial, group=group)
        return partial

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _refuse_second_derivative(grads[0])
        return grads[0], None


def _refuse_second_derivative(grad: Tensor | None) -> None:
    """Raise where derivatives of a backward pass are requested: its collectives are not differentiable.

    Raises:
        RuntimeError: second derivatives are requested, or several gradients at once.
    """
    if grad is not None and wants_definition(grad):
        raise RuntimeError(
            "second derivatives (create_graph=True) and vectorized Jacobians are not available under tensor parallelism: compute them on a"
            " model that is not sharded."
        )
