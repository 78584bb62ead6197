"""Apply LoRA to a model that is already wrapped or sharded.

*Before* wrapping there is nothing to do: DDP, FSDP2 and tensor-parallel plans treat adapters like any other parameters.

*After* wrapping, the wrapper does not know a new parameter. It would not reduce its gradient, and ranks would diverge without an error.
So adapters are replicated on every data-parallel rank (they are small). :class:`~lightning_lora.utils.gradient_reducer.GradientReducer`
averages their gradients in one collective at the end of each backward pass.

On a tensor-parallel base adapters become DTensors whose placements follow the base weight's. Column-parallel (W is Shard(0)): B is sharded,
A is replicated. Row-parallel (W is Shard(1)): A is sharded, B is replicated. The update then has the placement of the base's output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from lightning_lora.layers.base import PREFIX, LoRALayer, kept_parameters, lora_layers
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.plan_hooks import take_over
from lightning_lora.utils.gradient_reducer import GradientReducer
from lightning_lora.utils.sharding import broadcast, full_tensor, is_sharded, local_tensor, reshard
from lightning_lora.utils.torch_private_parallel import fsdp1_copies, fsdp1_flat, fsdp1_originals, fsdp1_parts, fsdp2_group

_WRAPPERS = (FSDPModule, FullyShardedDataParallel)


def adopt(model: nn.Module, layers: Iterable[tuple[str, LoRALayer]]) -> None:
    """Place new adapters on a model that is already wrapped, and reduce their gradients. On a model that is not wrapped, do nothing.

    Args:
        model: the wrapped model.
        layers: (name, layer) pairs, just adapted.

    Raises:
        ValueError: the model is wrapped in DistributedDataParallel, which cannot register new parameters; or a layer's kind has no
            placements on a tensor-parallel base; or a layer is in an FSDP2 unit that shards nothing.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "model is wrapped in DistributedDataParallel, which would not reduce new parameters: apply LoRA before wrapping it."
        )
    owners = _owners(model)
    reduced: dict[tuple[str, ...], tuple[list[Any], list[nn.Parameter]]] = {}
    for name, layer in layers:
        owner = owners[layer]
        try:
            groups = [] if owner is None else data_parallel_groups(owner)
            if any(is_sharded(part.weight) for part in layer.by_weight().values()):
                _place(layer, data_dims=len(groups))
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}.") from error
        if groups:
            reduced.setdefault(tuple(group.group_name for group in groups), (groups, []))[1].extend(layer.lora_parameters().values())
    for groups, parameters in reduced.values():
        broadcast(parameters, groups)
        GradientReducer(parameters, groups)
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            _freeze_copies(module)


def forget(model: nn.Module) -> None:
    """Remove the adapters from the wrappers' lists, before they are deleted.

    FSDP registers the parameters in its own lists again at the next forward pass.

    Raises:
        ValueError: as :func:`lists_without_adapters`. Nothing is changed then.
    """
    for group, parameters in lists_without_adapters(model):
        for gone in set(group.fsdp_params).difference(parameters):
            gone._post_load_hook_handle.remove()  # it would require the adapter whenever a state dict is loaded
        group.fsdp_params = parameters


def lists_without_adapters(model: nn.Module) -> list[tuple[Any, list[Any]]]:
    """Return each FSDP2 parameter group with adapters → its list of parameters without them. Nothing is changed.

    Raises:
        ValueError: FSDP1 flattened an adapter into one parameter with its base, or an FSDP2 unit contains only adapters.
    """
    reshard(model)
    kept: list[tuple[Any, list[Any]]] = []
    for name, unit in [(name, module) for name, module in model.named_modules() if isinstance(module, _WRAPPERS)]:
        where = f"{name or type(model).__name__!r}"
        if isinstance(unit, FullyShardedDataParallel):
            for part, module in fsdp1_parts(unit):
                if _of_adapter(module, part):
                    raise ValueError(
                        f"{where}: FSDP1 flattened {part} into one parameter with the base, from which it cannot be taken:"
                        " wrap with ignored_states=replicated_parameters(model), or load a checkpoint into a model that is not wrapped."
                    )
        elif _shards_adapters(unit) and (group := fsdp2_group(unit)) is not None:
            kept.append((group, [p for p in group.fsdp_params if not _of_adapter(p._module_info.module, p._module_info.param_name)]))
            if not kept[-1][1]:
                raise ValueError(
                    f"{where}: FSDP2 shards nothing but adapters there (ignored_params), and cannot be left with nothing: load a checkpoint"
                    " into a model that is not wrapped."
                )
    return kept


def _shards_adapters(unit: Any) -> bool:
    """True if the unit contains adapters from before it was wrapped. Later ones are not in FSDP2's list."""
    return any(is_sharded(p) for _, layer in lora_layers(unit) for p in layer.lora_parameters().values())


def _of_adapter(module: nn.Module, name: str) -> bool:
    return isinstance(module, LoRALayer) and name.startswith(PREFIX)


def place_adapters(model: nn.Module) -> None:
    """Give adapters that a tensor-parallel plan has sharded with their linear the placements that :func:`adopt` gives them."""
    for _, layer in lora_layers(model):
        if isinstance(layer, nn.Linear) and is_sharded(layer.weight):
            for name, placements in _placements(layer, layer.weight.placements).items():
                parameter = layer._parameters[name]
                assert isinstance(parameter, DTensor)
                layer._parameters[name] = nn.Parameter(
                    parameter.detach().redistribute(placements=placements), requires_grad=parameter.requires_grad
                )
            if isinstance(layer, LoRALinear):
                take_over(layer)


def replicated_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return all trainable parameters, for ``FullyShardedDataParallel(model, ignored_states=replicated_parameters(model))``.

    FSDP1 flattens a block into one parameter. With adapters in it, that needs gradient memory for the frozen base too.

    Args:
        model: an adapted model that is not wrapped yet.

    Examples:
        >>> ignored = replicated_parameters(apply_lora(model))
        >>> len(ignored) == len(get_lora_parameters(model))
        True
    """
    return [parameter for _, parameter in kept_parameters(model)]


def summoned(model: nn.Module, layers: Iterable[tuple[str, LoRALayer]]) -> Iterator[list[tuple[str, LoRALayer]]]:
    """Yield the layers in batches. The weights of a batch are full tensors, and may be written to until the next one.

    Under FSDP1 a batch has the layers of one flat parameter, which is gathered and then written back. So no rank ever holds the full
    model. Otherwise there is one batch with all layers.
    """
    layers, owners = list(layers), _owners(model)
    by_owner: dict[nn.Module | None, list[tuple[str, LoRALayer]]] = {}
    for name, layer in layers:
        owner = owners[layer]
        by_owner.setdefault(owner if isinstance(owner, FullyShardedDataParallel) else None, []).append((name, layer))
    for owner, batch in by_owner.items():
        with nullcontext() if owner is None else FullyShardedDataParallel.summon_full_params(owner, recurse=False, writeback=True):
            yield batch


def data_parallel_groups(wrapped: nn.Module) -> list[Any]:
    """Return the process groups over which a wrapper averages gradients, one per mesh dimension."""
    if isinstance(wrapped, FullyShardedDataParallel):
        groups = [wrapped.process_group]
        replicas = fsdp1_copies(wrapped)
        return groups if replicas is None else [*groups, replicas]
    sharded: list[Any] = [parameter for parameter in wrapped.parameters() if is_sharded(parameter)]
    if not sharded:
        raise ValueError("FSDP2 shards nothing there (ignored_params) and has no mesh: apply LoRA before wrapping")
    # A parameter in FSDP2's ignored_params has only the tensor-parallel mesh, which has fewer dimensions.
    widest = max(sharded, key=lambda parameter: parameter.device_mesh.ndim)
    # FSDP2's mesh dimensions come first: replicas, if there are any, then shards.
    copies = next((dim for dim, placement in enumerate(widest.placements) if not placement.is_replicate()), widest.device_mesh.ndim - 1)
    return [widest.device_mesh.get_group(dim) for dim in range(copies + 1)]


def replicas(tensor: Any) -> list[Any]:
    """Return the process groups of the mesh dimensions along which a DTensor is replicated."""
    return [tensor.device_mesh.get_group(dim) for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a total 2-norm. They may be plain tensors and DTensors on any meshes (torch takes only one kind).

    Args:
        parameters: those without a gradient are skipped.
        max_norm: largest 2-norm of all gradients together.

    Returns:
        The norm before clipping, the same on every rank.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    pieces: dict[tuple[tuple[str, ...], torch.dtype], list[Tensor]] = {}
    groups: dict[tuple[str, ...], list[Any]] = {}
    for grad in grads:
        # Count once what is the same on every rank: a plain gradient, and a DTensor's along mesh dimensions where it is replicated.
        if is_sharded(grad) and any(placement.is_partial() for placement in grad.placements):  # type: ignore[attr-defined]
            grad = full_tensor(grad)
        cut = [d for d, placement in enumerate(grad.placements) if placement.is_shard()] if is_sharded(grad) else []  # type: ignore[attr-defined]
        split = [grad.device_mesh.get_group(d) for d in cut]  # type: ignore[attr-defined]
        key = tuple(group.group_name for group in split)
        groups[key] = split
        pieces.setdefault((key, grad.dtype), []).append(local_tensor(grad))
    # A few launches for all gradients: with some for each, the GPU waited for Python, 20 ms a step for the 448 adapters of an 8B model.
    squares: dict[tuple[str, ...], Tensor] = {}
    for (key, dtype), some in pieces.items():
        norms = torch._foreach_norm(some, 2, dtype=torch.promote_types(dtype, torch.float32))
        squares[key] = squares.get(key, 0) + torch.stack(norms).square().sum()
    for key, square in squares.items():
        for group in groups[key]:
            dist.all_reduce(square, group=group)
    if not squares:
        return torch.zeros(())  # as torch
    norm = torch.stack(list(squares.values())).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    for dtype in {grad.dtype for grad in grads}:
        torch._foreach_mul_([local_tensor(grad) for grad in grads if grad.dtype == dtype], scale.to(dtype))
    return norm


def _place(layer: LoRALayer, data_dims: int) -> None:
    """Turn the adapter of a tensor-parallel base into matching DTensors. The first ``data_dims`` mesh dimensions are data-parallel."""
    weight = next(iter(layer.by_weight().values())).weight
    mesh, placements = weight.device_mesh, weight.placements[data_dims:]
    if not placements:
        return
    if data_dims:
        mesh = mesh[mesh.mesh_dim_names[data_dims:]]
    wanted = _placements(layer, placements)
    for name, full in layer.lora_parameters().items():
        broadcast([full], [mesh.get_group(dim) for dim in range(mesh.ndim)])
        replicated = DTensor.from_local(full.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
        layer._parameters[name] = nn.Parameter(replicated.redistribute(placements=wanted[name]), requires_grad=full.requires_grad)
    if isinstance(layer, LoRALinear):
        take_over(layer)


def _placements(layer: LoRALayer, base: Sequence[Any]) -> dict[str, list[Any]]:
    """Return adapter parameter → its placement on each dimension of a mesh, given the weight's placements."""
    on_each = [layer.adapter_placements(placement) for placement in base]
    return {name: [placements[name] for placements in on_each] for name in layer.lora_parameters()}


def _owners(model: nn.Module) -> dict[nn.Module, nn.Module | None]:
    """Return module → the innermost wrapper around it, None if there is none."""
    owners: dict[nn.Module, nn.Module | None] = {}

    def walk(module: nn.Module, owner: nn.Module | None) -> None:
        owner = module if isinstance(module, _WRAPPERS) else owner
        owners.setdefault(module, owner)
        for child in module.children():
            walk(child, owner)

    walk(model, None)
    return owners


def _freeze_copies(wrapped: nn.Module) -> None:
    """Freeze FSDP1's flat parameter if all its originals were frozen after wrapping: otherwise it gets gradients."""
    flat = fsdp1_flat(wrapped)
    if flat is not None and not any(p.requires_grad for p in fsdp1_originals(wrapped)):
        flat.requires_grad_(False)
