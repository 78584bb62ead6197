"""The private names of torch's processes and parallel wrappers (DDP, FSDP) that the package uses, wrapped once.

Each entry says what it is for and what breaks without it. See :mod:`lightning_lora.utils.torch_private`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Processes.


def default_store() -> Any:
    """Return the key-value store with which the processes started. Without it a distributed run under ``LoRACallback`` raises."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def abort_process_groups() -> None:
    """Abort every process group of this process. Without it a process that raises leaves the others waiting, and raises another error."""
    from torch.distributed import distributed_c10d

    distributed_c10d._abort_process_group()


# Wrappers.


def ddp_ignores(module: nn.Module, names: Iterable[str]) -> None:
    """Make DDP ignore these parameters too, as Lightning and transformers do. Without it a quantized base raises under DDP."""
    from torch.nn.parallel import DistributedDataParallel

    ignored = dict.fromkeys([*getattr(module, "_ddp_params_and_buffers_to_ignore", ()), *names])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(ignored))


def fsdp1_flat(unit: Any) -> Any:
    """Return the flat parameter of an FSDP1 unit, None if it has none. FSDP1 is no longer being changed."""
    return None if unit._handle is None else unit._handle.flat_param


def fsdp1_parts(unit: Any) -> list[tuple[str, nn.Module]]:
    """Return ``(parameter name, module)`` for every parameter that was flattened."""
    flat = fsdp1_flat(unit)
    return [] if flat is None else [(name, module) for name, module, _ in flat._param_infos]


def fsdp1_runs(unit: Any) -> list[tuple[tuple[nn.Module, str], Tensor, tuple[int, ...], int, tuple[int, ...]]]:
    """Return what this rank holds of every parameter that was flattened. Without it a base's fingerprint raises under FSDP1.

    Each entry has the module and the parameter's name, the local values (n,), the full shape, the position of the first local value in
    the full parameter's memory, and the full parameter's strides.
    """
    flat = fsdp1_flat(unit)
    if flat is None:
        return []
    shards = getattr(flat, "_local_shard", flat).detach()  # before the first pass, the flat parameter itself
    runs: dict[tuple[nn.Module, str], Any] = {}
    for (name, module, _), shape, strides, shard in zip(
        flat._param_infos, flat._shapes, flat._strides, flat._shard_param_infos, strict=True
    ):
        first = shard.offset_in_shard or 0
        local = shards[first : first + (shard.numel_in_shard or 0)]
        runs[module, name] = (local, tuple(shape), shard.intra_param_start_idx or 0, tuple(strides))
    tied = {(info.module, info.param_name): (info.prim_module, info.prim_param_name) for info in flat._shared_param_infos}
    runs |= {place: runs[first] for place, first in tied.items()}
    return [(place, *run) for place, run in runs.items()]


def fsdp1_flattened(parameter: nn.Parameter) -> bool:
    """True if FSDP1 has flattened the parameter. Without it an adapter saved from inside an FSDP1 unit has a wrong fingerprint."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def fsdp1_originals(unit: Any) -> list[nn.Parameter]:
    """Return the original parameters that were flattened, which ``use_orig_params=True`` keeps."""
    flat = fsdp1_flat(unit)
    return list(() if flat is None else flat._params or ())


def fsdp1_copies(unit: Any) -> Any:
    """Return the process group of the replicas of a shard under hybrid sharding, None under any other sharding."""
    return getattr(unit, "_inter_node_pg", None)


def fsdp2_original(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a module had before FSDP2 replaced it. Without it an export names FSDP2's class."""
    first, *rest = cls.__bases__
    return fsdp2_original(rest[0]) if first.__name__ == "FSDPModule" else cls


def fsdp2_group(unit: Any) -> Any:
    """Return the parameter group of an FSDP2 unit, None if it shards nothing. Needed to take adapters out of it, and by ``experimental/``.

    Raises:
        ValueError: this version of torch keeps the group elsewhere, or the unit has several groups, over different meshes.
    """
    try:
        return unit._get_fsdp_state()._fsdp_param_group
    except (AttributeError, AssertionError) as error:
        raise ValueError(
            f"torch {torch.__version__} has no single parameter group in {type(unit).__name__}, or keeps it elsewhere, so adapters"
            " cannot be taken out of FSDP2: load a checkpoint into a model that is not wrapped."
        ) from error


def let_fsdp2_shard_integers() -> None:
    """Let FSDP2 shard parameters of integers on torch 2.11 and 2.12, as torch 2.13 does. Without it NF4 and FP8 bases raise there.

    FSDP2 makes each piece a parameter, and only then copies ``requires_grad``. Until it does, a parameter requires a gradient by default,
    which integers refuse. So what FSDP2 takes for ``torch.nn`` gets another default.
    """
    if _release() >= (2, 13) or not torch.distributed.is_available():
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    if not isinstance(_fsdp_param.nn, _ParametersOfIntegers):
        _fsdp_param.nn = _ParametersOfIntegers("torch.nn")


class _ParametersOfIntegers(ModuleType):
    """``torch.nn``, whose parameters of integers do not require a gradient unless they are told to."""

    @staticmethod
    def Parameter(data: Tensor, requires_grad: bool | None = None) -> nn.Parameter:
        return nn.Parameter(data, data.is_floating_point() or data.is_complex() if requires_grad is None else requires_grad)

    def __getattr__(self, name: str) -> Any:
        return getattr(nn, name)


# Tensor-parallel plans.


def keep_random_results(graph: Any, inputs: Sequence[Any]) -> None:
    """Let the checkpoints in a compiler's graph keep what draws random numbers (attention does, to torch), if the graph trains DTensors.

    From torch 2.13 on, such a graph also keeps their mesh. On CPUs the generator's states of what is computed again are put behind the
    mesh, where none but tensors are expected. Without it checkpointed and compiled blocks under tensor parallelism raise there.

    Args:
        graph: a ``torch.fx.GraphModule``, as a backend of ``torch.compile`` gets it.
        inputs: its example inputs.
    """
    if _release() < (2, 13) or not any(hasattr(x, "device_mesh") and x.requires_grad and x.device.type == "cpu" for x in inputs):
        return
    for node in graph.graph.nodes:
        if node.target is torch.ops.higher_order.tag_activation_checkpoint:
            graph.get_submodule(node.args[0].target).meta.setdefault("_checkpoint_context_fn", _KEEP_RANDOM)


def _keep_random(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    random = torch.Tag.nondeterministic_seeded in op.tags
    return CheckpointPolicy.MUST_SAVE if random else CheckpointPolicy.PREFER_RECOMPUTE


_KEEP_RANDOM = partial(create_selective_checkpoint_contexts, _keep_random)


def plain_linear_hooks(before: dict[Any, Any], after: dict[Any, Any]) -> tuple[Any, Any] | None:
    """Return the ids of the two hooks by which a tensor-parallel plan makes a linear's plain input a DTensor and its output plain again.

    None if there are none, or if they do more than that. torch's are functions without a name, so what they call is read from their
    closures. Without it tensor-parallel linears give the same numbers, but wait for Python.

    Args:
        before: id → hook on the input.
        after: id → hook on the output.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    columns, whole = (Shard(-1),), (Replicate(),)
    for style, given, result in ((ColwiseParallel, whole, columns), (RowwiseParallel, columns, whole)):
        enters = [key for key, hook in before.items() if _calls(hook, "input_fn", style._prepare_input_fn, (given, given))]
        leaves = [key for key, hook in after.items() if _calls(hook, "output_fn", style._prepare_output_fn, (result, True))]
        if len(enters) == len(leaves) == 1:
            return enters[0], leaves[0]
    return None


def _release() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def _calls(hook: Any, name: str, function: Any, arguments: tuple[Any, ...]) -> bool:
    """True if the variable of that name in a function's closure is ``partial(function, *arguments)``."""
    code, cells = getattr(hook, "__code__", None), getattr(hook, "__closure__", None)
    if code is None or not cells or name not in code.co_freevars:
        return False
    called = cells[code.co_freevars.index(name)].cell_contents
    return isinstance(called, partial) and called.func is function and called.args == arguments and not called.keywords
