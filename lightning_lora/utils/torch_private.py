"""Every private name of torch that the package uses, wrapped once: what it is for, and what breaks when it goes.

Two places are left out. ``experimental/`` builds on FSDP2's insides and says so. And some names are as good as public, so they stand
where they are used: the tables and methods of ``nn.Module`` that its subclasses have relied on for years, a tensor's ``_version``, and
the ``torch._foreach_*`` functions, which torch documents. ``tests/test_private_names.py`` lists them and refuses all others elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn


def _name(path: str) -> Any:
    """A private name of torch.

    Raises:
        RuntimeError: this torch does not have it.
    """
    found: Any = torch
    for part in path.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise RuntimeError(f"torch {torch.__version__} has no torch.{path}, which lightning_lora needs: install torch 2.11 to 2.14.")
    return found


# torch.func is at work: layers take plain operations then. Without it the package does not import.
transforms_active: Callable[[], bool] = _name("_C._are_functorch_transforms_active")

# A gradient that vectorized Jacobians (is_grads_batched=True) have stacked: backward passes take plain operations then. Likewise.
is_batched: Callable[[Tensor], bool] = _name("_C._functorch.is_legacy_batchedtensor")

# The number of the backward pass that is running. Gradients of replicated adapters are averaged once for each. Likewise.
backward_pass_id: Callable[[], int] = _name("_C._current_graph_task_id")

# The base class of the norms that keep running statistics, which adapter files hold. Likewise.
NormWithStatistics: type[nn.Module] = _name("nn.modules.batchnorm._NormBase")

# Where torch's wrappers keep the module that they wrap. Without these, blocks inside FSDP1 or a checkpoint wrapper are not found.
COMPILED_CHILD = "_orig_mod"
FSDP1_CHILD = "_fsdp_wrapped_module"
WRAPPED_CHILDREN = ("_checkpoint_wrapped_module", FSDP1_CHILD)


def after_backward_pass(callback: Callable[[], None]) -> None:
    """Call something when the backward pass that is running has ended, as DDP and FSDP do. Without it averaging raises."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def dtensor_storage(tensor: Any) -> Tensor:
    """This rank's piece of a DTensor, the storage itself: ``to_local()`` makes a new tensor that autograd knows. Without it all raises."""
    piece: Tensor = tensor._local_tensor
    return piece


def uncompiled(module: nn.Module) -> nn.Module:
    """What ``torch.compile(module)`` was made from. Without it a fingerprint names the wrapper's class in place of the model's."""
    original: nn.Module = getattr(module, COMPILED_CHILD, module)
    return original


def unscales_itself(optimizer: Any) -> bool:
    """Whether a fused optimizer takes gradients still scaled. Without it AdaLoRA's regularizer is too weak under fp16."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


# The compiler.


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """What ``module.compile()`` left on the module, and a call uses; None before. Without it ``compile_layers`` raises."""
    return module._compiled_call_impl


def set_compiled_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Replace it; None makes calls run as written."""
    module._compiled_call_impl = call


def compiler_backend(name: str) -> Callable[..., Any]:
    """A backend of ``torch.compile`` by its name. Without it ``compile_layers`` raises."""
    from torch._dynamo.backends.registry import lookup_backend

    found: Callable[..., Any] = lookup_backend(name)
    return found


def change_dynamo(**settings: Any) -> dict[str, Any]:
    """Change global settings of the tracer, those that this torch has; what they were. Without one, compiled blocks are slower."""
    from torch._dynamo import config

    earlier = {name: getattr(config, name) for name in settings if hasattr(config, name)}
    for name in earlier:
        setattr(config, name, settings[name])
    return earlier


def autograd_settings(**settings: Any) -> AbstractContextManager[Any]:
    """Change settings of the compiler's autograd for a while, those that this torch has. Without one, compiled steps take more memory."""
    from torch._functorch import config

    patch: AbstractContextManager[Any] = config.patch({name: value for name, value in settings.items() if hasattr(config, name)})
    return patch


def may_vary(tensor: Tensor, dim: int) -> None:
    """Let a dimension's size differ from call to call in one graph. Without it compiling the loss raises."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


# Wrappers.


def ddp_ignores(module: nn.Module, names: Iterable[str]) -> None:
    """Have DDP leave some parameters alone, as Lightning and transformers do. Without it a quantized base raises under DDP."""
    from torch.nn.parallel import DistributedDataParallel

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(names))


def fsdp1_flat(unit: Any) -> Any:
    """The parameter into which FSDP1 flattened what a unit holds; None if nothing. FSDP1 does not change any more."""
    return None if unit._handle is None else unit._handle.flat_param


def fsdp1_parts(unit: Any) -> list[tuple[str, nn.Module]]:
    """``(parameter name, module)`` of all that was flattened."""
    flat = fsdp1_flat(unit)
    return [] if flat is None else [(name, module) for name, module, _ in flat._param_infos]


def fsdp1_originals(unit: Any) -> list[nn.Parameter]:
    """The parameters that were flattened, as ``use_orig_params=True`` keeps them."""
    flat = fsdp1_flat(unit)
    return list(() if flat is None else flat._params or ())


def fsdp1_copies(unit: Any) -> Any:
    """The process group of the copies of a shard under hybrid sharding; None under another."""
    return getattr(unit, "_inter_node_pg", None)


def fsdp2_group(unit: Any) -> Any:
    """What a unit of FSDP2 shards, None if that is nothing: for taking adapters out of its list, and for ``experimental/``.

    Raises:
        ValueError: this torch keeps it elsewhere, or the unit has several, over different meshes.
    """
    try:
        return unit._get_fsdp_state()._fsdp_param_group
    except (AttributeError, AssertionError) as error:
        raise ValueError(
            f"torch {torch.__version__} has no single parameter group in {type(unit).__name__}, or not where it used to be, and adapters"
            " cannot be taken out of FSDP2: load a checkpoint into a model that is not wrapped."
        ) from error
