"""``torch.compile`` for each of a model's repeated blocks, in place: one graph serves them all.

A transformer is one block many times over, so compiling a block is quick and done once, and nothing outside it is traced (an
attention mask made under tracing made a whole compiled model slower than its blocks compiled one by one). Names and state-dict
keys stay: ``block.compile()`` puts a compiled call beside the module, not a module around it.

A block is compiled anew where its input needs no gradient (the first one, above a frozen embedding: a shorter graph; none if the model
has ``enable_input_require_grads()``), for evaluation, once merged, and when the batch's rows or length change for the first time: from
then on that size may be any. Gradient checkpointing and sharding stay around the compiled call, whichever came first.

Small steps take as long as the CPU needs to launch their kernels. With CUDA graphs each block's passes are recorded once and replayed by
one launch, from and to fixed memory: who trains so runs each batch in :func:`cuda_graph_step`. ``LoRACallback`` does the same from its
hooks.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_lora.ops import backends
from lightning_lora.utils.blocks import BLOCKS, repeated_blocks
from lightning_lora.utils.torch_private import autograd_settings, change_dynamo, compiled_call, compiler_backend, set_compiled_call

# The tracer's global settings that blocks need. All modules' calls are one piece of code to it: it counts graphs by that, and after eight
# leaves it uncompiled; 64 are more than blocks of a few classes need. Linears of one input hand each other their outputs
# (layers/shared_input.py). Without the second setting a block that does so inside a checkpoint is left uncompiled: eager code would do it
# in the second forward pass too. Nothing of it is there once the block has returned.
_SETTINGS: dict[str, Any] = {"recompile_limit": 64, "skip_fwd_side_effects_in_bwd_under_checkpoint": True}

_earlier: dict[str, Any] = {}  # those that were lower, as they were before
_compiled: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the blocks that run compiled, of all models


def compile_layers(model: nn.Module, *, backend: str | Callable[..., Any] = "inductor", cuda_graphs: bool = False) -> list[str]:
    """Compile each of a model's repeated blocks (:func:`~lightning_lora.utils.blocks.repeated_blocks`) in place; ones that are compiled
    already stay so.

    Two global settings of the compiler change with it, ``recompile_limit`` and ``skip_fwd_side_effects_in_bwd_under_checkpoint`` of
    ``torch._dynamo.config``, for other compiled code of the process too: until :func:`uncompile_layers` was called for every model.

    Args:
        model: any module, wrapped or not.
        backend: of ``torch.compile``.
        cuda_graphs: record the compiled passes as CUDA graphs: for batches of one size or few, since each is recorded for itself, and
            keeps its memory until the process ends or ``torch.compiler.reset()``; for parameters that stay where they are, so not for
            FSDP. What a block gives out is written over in the next step: clone what is to be kept.

    Returns:
        The blocks' names.

    Raises:
        ValueError: the model has no repeated blocks; or one is to be recorded that is compiled already, or by a backend that cannot.
    """
    if cuda_graphs and isinstance(backend, str) and backend != "inductor":
        raise ValueError(f"backend={backend!r} records no CUDA graphs: use 'inductor', or leave cuda_graphs out.")
    blocks = dict(repeated_blocks(model))
    if not blocks:
        raise ValueError(
            f'{type(model).__name__} has no repeated blocks to compile ({BLOCKS}). Leave compile="layer" out, and call .compile() on the'
            " parts that take the time."
        )
    for name, block in blocks.items():
        if cuda_graphs and not isinstance(compiled_call(block), (_Recorded, type(None))):
            raise ValueError(
                f"{name} is compiled already, without CUDA graphs: call uncompile_layers(model) first, or leave cuda_graphs out."
            )
    _change_settings()
    for block in blocks.values():
        if compiled_call(block) is None:
            block.compile(backend=_prepared(backend, cuda_graphs))
            call = compiled_call(block)
            if cuda_graphs and call is not None:
                set_compiled_call(block, _Recorded(call))
            _compiled.add(block)
    return list(blocks)


@contextmanager
def cuda_graph_step(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Around the forward and backward pass of one batch, where :func:`compile_layers` records CUDA graphs.

    .. code-block:: python

        with cuda_graph_step(get_lora_parameters(model)):
            model(**batch).loss.backward()
        optimizer.step()

    The passes of the batch before may be written over from here on, and at the end gradients are copied to memory of their own. A batch
    without a backward pass goes in one too. After an error no gradient is copied.

    Args:
        parameters: those that get gradients.
    """
    parameters = list(parameters)
    begin_step()
    yield
    keep_gradients(parameters)


def begin_step() -> None:
    """Before a batch, with CUDA graphs: what was replayed so far may be written over. Without this a block would take the one before it
    for the step before it. Once called, torch begins no step by itself any more in this process, for no recorded module."""
    torch.compiler.cudagraph_mark_step_begin()


def keep_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """After a backward pass, with CUDA graphs: copy the gradients out of the memory that the next step writes over."""
    held = [(p, p.grad) for p in parameters if p.grad is not None and p.grad.layout == torch.strided]
    if held:
        copies = torch._foreach_mul([gradient for _, gradient in held], 1)  # a few launches for all of them
        for (parameter, _), copy in zip(held, copies, strict=True):
            parameter.grad = copy


class _Recorded:
    """A compiled call that says so to what is traced inside it."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self.compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with backends.recording():
            return self.compiled(*args, **kwargs)


# The compiler keeps a result for the backward pass if an operation there has to have it in memory, or if it is used in places far apart:
# it takes time to be dearer than memory. The inputs of adapters' products are both.
_REBUILD = {"ban_recompute_materialized_backward": False, "ban_recompute_used_far_apart": False}


@functools.cache  # the compiler knows its own work again by the very object that did it
def _prepared(backend: str | Callable[..., Any], cuda_graphs: bool) -> Callable[..., Any]:
    """The backend, told to compute elementwise results again in the backward pass, and maybe to record what it compiles."""
    compile = compiler_backend(backend) if isinstance(backend, str) else backend
    options = {"config_patches": {"triton.cudagraphs": True}} if cuda_graphs else {}

    @functools.wraps(compile)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        with autograd_settings(**_REBUILD):
            return compile(*args, **kwargs, **options)

    return prepared


def uncompile_layers(model: nn.Module) -> None:
    """Let every block run as written again; what was compiled is found again if they are compiled anew.

    Once no block of any model runs compiled, the compiler's global settings are what they were before :func:`compile_layers`.
    """
    for _, block in repeated_blocks(model):
        set_compiled_call(block, None)
        _compiled.discard(block)
    if not _compiled:
        change_dynamo(**_earlier)
        _earlier.clear()


def _change_settings() -> None:
    """Give the tracer the settings that blocks need: it reads them whenever it compiles, also in a backward pass."""
    earlier = change_dynamo(**_SETTINGS)
    change_dynamo(**{name: value for name, value in earlier.items() if value > _SETTINGS[name]})  # a higher limit stays
    _earlier.update({name: value for name, value in earlier.items() if value < _SETTINGS[name]})
