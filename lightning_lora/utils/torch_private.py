"""Every private name of torch that the package uses, wrapped once. Each entry says what it is for and what breaks without it.

Those of processes and parallel wrappers are in :mod:`lightning_lora.utils.torch_private_parallel`. Two groups of names are elsewhere.
``experimental/`` depends on FSDP2's internals and says so. Names that are as good as public are used directly: the tables and methods of
``nn.Module`` that its subclasses have relied on for years, a tensor's ``_version``, and the ``torch._foreach_*`` functions, which torch
documents. ``tests/test_private_names.py`` lists them and refuses any others.
"""

from __future__ import annotations

import ctypes
import pickle
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
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

# The product of FP8 matrices with a scale per row. Without it importing raises.
scaled_mm: Callable[..., Tensor] = _name("_scaled_mm")

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
PythonUnpickler: Any = pickle._Unpickler


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
    """Return a nested list, tuple or dict with every tensor of a class changed.

    Without it ``export_merged`` and ``offload_frozen`` raise.
    """
    from torch.utils._pytree import tree_map_only

    return tree_map_only(cls, change, tree)


def may_vary(tensor: Tensor, dim: int) -> None:
    """Let a dimension's size differ between calls of one graph. Without it compiling the loss raises."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors of a nested list, tuple or dict, or of a model's output. Without it ``estimate_memory`` raises."""
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage_key(tensor: Tensor) -> int:
    """Return a number that a tensor and its views share, on the meta device too. Without it ``estimate_memory`` raises."""
    return tensor.untyped_storage()._cdata


def operator_name(op: Any) -> str:
    """Return the name of a dispatched operator, ``namespace::name``. Without it ``estimate_memory`` raises."""
    return str(op._schema.name)


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return causal attention by torch's flash kernel, also on the meta device. Without it ``estimate_memory`` raises."""
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]
    return output


def dispatch_mode() -> type[Any]:
    """Return the class of modes that see each operator run. Without it ``estimate_memory`` raises."""
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


_TREES, _PLACES = "torch._inductor.cudagraph_trees", ("tree_manager_containers", "tree_manager_locks")


def _trees_of_one_thread() -> Any:
    """Return torch's module of CUDA graphs if it is imported and has a place for them in the importing thread alone; else None."""
    trees = sys.modules.get(_TREES)
    return None if hasattr(trees, "_initialize_tls") else trees


def place_for_cuda_graphs() -> None:
    """Give this thread a place for CUDA graphs. Without the names, all threads but the first that records fail before torch 2.13."""
    trees = _trees_of_one_thread()
    if trees is None or hasattr(trees.local, _PLACES[0]):
        return
    places: tuple[dict[Any, Any], ...] = ({}, defaultdict(Lock))
    for name, value in zip(_PLACES, places, strict=True):
        setattr(trees.local, name, value)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))  # torch releases one reference more than it holds when a thread ends
        torch._C._stash_obj_in_tls(name, value)  # the threads of autograd have what is stashed


@contextmanager
def own_cuda_graphs() -> Iterator[None]:
    """Let this thread record CUDA graphs, and free them at its end, before torch 2.13."""
    place_for_cuda_graphs()
    given = _TREES in sys.modules  # else the place is torch's own, which an import in this thread makes
    try:
        yield
    finally:
        trees = _trees_of_one_thread()
        for value in (getattr(trees.local, name) for name in _PLACES if hasattr(getattr(trees, "local", None), name)):
            if not given:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
            value.clear()
