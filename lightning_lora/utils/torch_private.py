"""Every private name of torch that the package uses, wrapped once. Each entry says what it is for and what breaks without it.

Two groups of names are elsewhere. ``experimental/`` depends on FSDP2's internals and says so. Names that are as good as public are used
directly: the tables and methods of ``nn.Module`` that its subclasses have relied on for years, a tensor's ``_version``, and the
``torch._foreach_*`` functions, which torch documents. ``tests/test_private_names.py`` lists them and refuses any others.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn


def _name(path: str) -> Any:
    """Return the private name of torch at a dotted path.

    Raises:
        RuntimeError: this version of torch does not have it.
    """
    found: Any = torch
    for part in path.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise RuntimeError(f"torch {torch.__version__} has no torch.{path}, which lightning_lora needs: install torch 2.11 to 2.14.")
    return found


# True while a torch.func transform runs: layers use plain operations then. Without it importing the package raises.
transforms_active: Callable[[], bool] = _name("_C._are_functorch_transforms_active")

# True for a gradient that a vectorized Jacobian (is_grads_batched=True) has stacked: backward passes use plain operations then.
# Without it importing raises.
is_batched: Callable[[Tensor], bool] = _name("_C._functorch.is_legacy_batchedtensor")

# The number of the running backward pass. Gradients of replicated adapters are averaged once per pass. Without it importing raises.
backward_pass_id: Callable[[], int] = _name("_C._current_graph_task_id")

# Whether an x86 processor has instructions for bfloat16. Without it importing raises.
cpu_multiplies_bfloat16: Callable[[], bool] = _name("cpu._is_avx512_bf16_supported")

# The base class of norms with running statistics, which adapter files store. Without it importing raises.
NormWithStatistics: type[nn.Module] = _name("nn.modules.batchnorm._NormBase")

# The attributes in which torch's wrappers keep the wrapped module. Without them, blocks inside FSDP1 or a checkpoint wrapper
# are not found.
COMPILED_CHILD = "_orig_mod"
FSDP1_CHILD = "_fsdp_wrapped_module"
WRAPPED_CHILDREN = ("_checkpoint_wrapped_module", FSDP1_CHILD)

# The same of Lightning Fabric's wrapper: what runs (another wrapper under some strategies), and what the user gave. Without them adapter
# files of a model that Fabric set up have its names.
FABRIC_CHILDREN = ("_forward_module", "_original_module")


# The unpickler of torch.load(weights_only=True), and the functions by which torch rebuilds tensors. Without them importing raises.
WeightsOnlyUnpickler: type[Any] = _name("_weights_only_unpickler.Unpickler")
_REBUILD = "tensor tensor_v2 tensor_v3 qtensor parameter parameter_with_state meta_tensor_no_storage sparse_tensor nested_tensor"
REBUILD: dict[str, Callable[..., Any]] = {name: _name(f"_utils._rebuild_{name}") for name in [*_REBUILD.split(), "wrapper_subclass"]}
REBUILD["from_type_v2"] = _name("_tensor._rebuild_from_type_v2")
get_layout: Callable[[str], torch.layout] = _name("serialization._get_layout")

# Python's own unpickler that is written in Python. Without it importing raises.
PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


@contextmanager
def unpickling_with(unpickler: type[Any]) -> Iterator[None]:
    """Make ``torch.load(weights_only=True)`` use this subclass of its unpickler inside the ``with`` block, in every thread.

    torch then also checks the indices of sparse tensors, which it leaves out by default.
    """
    module, invariants = _name("_weights_only_unpickler"), torch.sparse.check_sparse_tensor_invariants
    with _UNPICKLING:
        if not _UNPICKLERS:
            _CHECKED.append(invariants.is_enabled())
            invariants.enable()
        _UNPICKLERS.append(unpickler)
        module.Unpickler = unpickler
    try:
        yield
    finally:
        with _UNPICKLING:
            _UNPICKLERS.remove(unpickler)
            module.Unpickler = _UNPICKLERS[-1] if _UNPICKLERS else WeightsOnlyUnpickler
            if not _UNPICKLERS and not _CHECKED.pop():
                invariants.disable()


_UNPICKLING, _UNPICKLERS, _CHECKED = Lock(), list[type[Any]](), list[bool]()  # a thread that is done leaves it to those that are not


def after_backward_pass(callback: Callable[[], None]) -> None:
    """Call a function when the running backward pass ends, as DDP and FSDP do. Without it averaging gradients raises."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def revive_hooks(parameter: nn.Parameter) -> None:
    """Make torch call a parameter's post-accumulate hooks again after ``swap_tensors``, which keeps them but leaves them unregistered.

    Without it gradients of tensor-parallel adapters would no longer be averaged once the module was moved.
    """
    parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks


def dtensor_storage(tensor: Any) -> Tensor:
    """Return this rank's local shard of a DTensor, the storage itself. Without it every use of a DTensor raises.

    ``to_local()`` makes a new tensor, which autograd tracks.
    """
    piece: Tensor = tensor._local_tensor
    return piece


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` was given. Without it a fingerprint names the wrapper's class instead of the model's."""
    original: nn.Module = getattr(module, COMPILED_CHILD, module)
    return original


def unscales_itself(optimizer: Any) -> bool:
    """True if a fused optimizer takes gradients that are still scaled. Without it AdaLoRA's regularizer is too weak under fp16."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


# The compiler.


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """Return the compiled function that ``module.compile()`` set, None before. Without it ``compile_layers`` raises."""
    return module._compiled_call_impl


def set_compiled_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Set the compiled function that calls of the module use. None makes calls run uncompiled."""
    module._compiled_call_impl = call


def compiler_backend(name: str) -> Callable[..., Any]:
    """Return a backend of ``torch.compile`` by its name. Without it ``compile_layers`` raises."""
    from torch._dynamo.backends.registry import lookup_backend

    found: Callable[..., Any] = lookup_backend(name)
    return found


def change_dynamo(**settings: Any) -> dict[str, Any]:
    """Change those global settings of the tracer that this version of torch has. Return their earlier values.

    Without a setting, compiled blocks are slower.
    """
    from torch._dynamo import config

    earlier = {name: getattr(config, name) for name in settings if hasattr(config, name)}
    for name in earlier:
        setattr(config, name, settings[name])
    return earlier


def autograd_settings(**settings: Any) -> AbstractContextManager[Any]:
    """Return a context that changes those settings of the compiler's autograd that this version of torch has.

    Without a setting, compiled steps take more memory.
    """
    from torch._functorch import config

    patch: AbstractContextManager[Any] = config.patch({name: value for name, value in settings.items() if hasattr(config, name)})
    return patch


def returns_new_tensors(op: Any) -> bool:
    """Return whether a dispatched operation returns only tensors and writes to no argument. Without it ``export_merged`` raises."""
    schema = op._schema
    return not schema.is_mutable and all(str(value.type) in ("Tensor", "List[Tensor]") for value in schema.returns)


def writes_to(op: Any, args: Any, kwargs: Any, cls: type[Tensor]) -> bool:
    """Return whether a dispatched operation writes to an argument of that class. Without it ``export_merged`` raises."""
    schema = op._schema
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    written = [given.get(argument.name) for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    found: list[Tensor] = []
    map_tensors(cls, found.append, written)
    return bool(found)


def map_tensors(cls: type[Tensor], change: Callable[[Any], Any], tree: Any) -> Any:
    """Return a nested list, tuple or dict with every tensor of a class changed. Without it ``export_merged`` raises."""
    from torch.utils._pytree import tree_map_only

    return tree_map_only(cls, change, tree)


def may_vary(tensor: Tensor, dim: int) -> None:
    """Let a dimension's size differ between calls of one graph. Without it compiling the loss raises."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


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
