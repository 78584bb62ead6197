"""Regional compilation: ``torch.compile`` each of a model's repeated blocks in place, with one graph for all.

A transformer repeats one block many times, so a block is compiled once, and quickly. Nothing outside it is traced: a full compiled model
was slower than its blocks compiled one by one, because its attention mask was built under tracing. Names and state-dict keys stay, since
``block.compile()`` stores a compiled call on the module and does not wrap it.

A block is compiled again in these cases:

- its input needs no gradient: the first block after a frozen embedding, with a shorter graph; never after ``enable_input_require_grads()``;
- in evaluation, and once merged;
- when the batch's rows or length change for the first time; from then on any size fits.

Gradient checkpointing and sharding wrap the compiled call, whichever is applied first.

Small steps take as long as the CPU needs to launch their kernels. With CUDA graphs each block's passes are recorded once and replayed by
one launch, with inputs and outputs in fixed memory. Run each training batch in :func:`cuda_graph_step` then. ``LoRACallback`` does the
same from its hooks.
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
from lightning_lora.utils.torch_private import (
    autograd_settings,
    change_dynamo,
    compiled_call,
    compiler_backend,
    place_for_cuda_graphs,
    set_compiled_call,
)
from lightning_lora.utils.torch_private_parallel import keep_random_results

# Global settings of Dynamo that blocks need.
# recompile_limit: all modules' calls are one code object to Dynamo. It counts graphs per code object, and after eight leaves it
# uncompiled. 64 are more than blocks of a few classes need.
# skip_fwd_side_effects_in_bwd_under_checkpoint: linears with a shared input store each other's outputs (layers/shared_input.py). Without
# this setting a checkpointed block that does so stays uncompiled, because eager code would repeat the side effect in the recomputed
# forward pass. Here that is harmless: the stored outputs are gone once the block has returned.
_SETTINGS: dict[str, Any] = {"recompile_limit": 64, "skip_fwd_side_effects_in_bwd_under_checkpoint": True}

_earlier: dict[str, Any] = {}  # the earlier values of the settings that were raised
_compiled: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the compiled blocks of all models


def compile_layers(model: nn.Module, *, backend: str | Callable[..., Any] = "inductor", cuda_graphs: bool = False) -> list[str]:
    """Compile each of a model's repeated blocks (:func:`~lightning_lora.utils.blocks.repeated_blocks`) in place.

    Blocks that are compiled already do not change. Two global settings of ``torch._dynamo.config`` change: ``recompile_limit`` and
    ``skip_fwd_side_effects_in_bwd_under_checkpoint``. They affect other compiled code of the process too, until
    :func:`uncompile_layers` was called for every model.

    Args:
        model: any module, wrapped or not.
        backend: of ``torch.compile``.
        cuda_graphs: record the compiled passes as CUDA graphs. Use it with few batch sizes: each is recorded separately, and keeps its
            memory until the process ends or ``torch.compiler.reset()``. Parameters must stay at their addresses, so not with FSDP. The
            next step overwrites a block's outputs: clone those to keep.

    Returns:
        The blocks' names.

    Raises:
        ValueError: the model has no repeated blocks; or ``cuda_graphs`` is set, and a block is compiled already without them, or the
            backend cannot record them.

    Examples:
        >>> compile_layers(apply_lora(model))
        ['model.layers.0', 'model.layers.1']
        >>> uncompile_layers(model)
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
                f"{name} is compiled already, without CUDA graphs: call uncompile_layers(model) first, leave your own .compile() out, or"
                " leave cuda_graphs out."
            )
    _change_settings()
    if cuda_graphs:
        place_for_cuda_graphs()
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
    """Run the forward and backward pass of one batch within it if :func:`compile_layers` records CUDA graphs.

    On entry, the previous batch's results may be overwritten. At the end, gradients are copied to memory of their own. Use it for a batch
    without a backward pass too. After an error no gradient is copied.

    Args:
        parameters: all that train, heads and biases too: the next batch overwrites the gradients of others.

    Examples:
        >>> optimizer = torch.optim.AdamW(lora_param_groups(apply_lora(model), lr=1e-4))
        >>> for batch in batches:  # after compile_layers(model, cuda_graphs=True)
        ...     with cuda_graph_step(p for p in model.parameters() if p.requires_grad):
        ...         model(**batch).loss.backward()
        ...     optimizer.step()
    """
    parameters = list(parameters)
    begin_step()
    yield
    keep_gradients(parameters)


def begin_step() -> None:
    """Call ``cudagraph_mark_step_begin`` before a batch: results of earlier replays may then be overwritten.

    Otherwise torch treats each block as a new iteration after the previous block, and overwrites that one's outputs. Once called, torch
    no longer begins iterations by itself in this process, for any recorded module.
    """
    torch.compiler.cudagraph_mark_step_begin()


def keep_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Copy the gradients out of the CUDA graphs' memory after a backward pass: the next step overwrites it."""
    held = [(p, p.grad) for p in parameters if p.grad is not None and p.grad.layout == torch.strided]
    if held:
        copies = torch._foreach_mul([gradient for _, gradient in held], 1)  # a few launches for all gradients
        for (parameter, _), copy in zip(held, copies, strict=True):
            parameter.grad = copy


class _Recorded:
    """A compiled call under ``backends.recording()``, which tells traced code that CUDA graphs are recorded."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self.compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with backends.recording():
            return self.compiled(*args, **kwargs)


# AOTAutograd's partitioner never recomputes results that are materialized in the backward pass or used far apart: it values time above
# memory. The inputs of the adapters' products are both. Allow it.
_REBUILD = {"ban_recompute_materialized_backward": False, "ban_recompute_used_far_apart": False}


@functools.cache  # Dynamo reuses compiled code only for the same backend object
def _prepared(backend: str | Callable[..., Any], cuda_graphs: bool) -> Callable[..., Any]:
    """Return the backend, set to recompute elementwise results in the backward pass, and to record CUDA graphs if asked."""
    compile = compiler_backend(backend) if isinstance(backend, str) else backend
    options = {"config_patches": {"triton.cudagraphs": True}} if cuda_graphs else {}

    @functools.wraps(compile)
    def prepared(graph: Any, inputs: Any, **kwargs: Any) -> Any:
        keep_random_results(graph, inputs)
        with autograd_settings(**_REBUILD):
            return compile(graph, inputs, **kwargs, **options)

    return prepared


def uncompile_layers(model: nn.Module) -> None:
    """Undo :func:`compile_layers`: the model's blocks run eagerly again. Blocks that you compiled yourself stay compiled.

    Compiled code stays cached, and is reused if the blocks are compiled again. Once no block of any model is compiled, Dynamo's global
    settings get back their values from before :func:`compile_layers`.

    Args:
        model: any module.

    Examples:
        >>> names = compile_layers(apply_lora(model))
        >>> uncompile_layers(model)
    """
    for _, block in repeated_blocks(model):
        if block in _compiled:
            set_compiled_call(block, None)
            _compiled.discard(block)
    if not _compiled:
        change_dynamo(**_earlier)
        _earlier.clear()


def _change_settings() -> None:
    """Set Dynamo's settings that blocks need. Dynamo reads them whenever it compiles, also in a backward pass."""
    earlier = change_dynamo(**_SETTINGS)
    change_dynamo(**{name: value for name, value in earlier.items() if value > _SETTINGS[name]})  # a higher limit stays
    _earlier.update({name: value for name, value in earlier.items() if value < _SETTINGS[name]})
