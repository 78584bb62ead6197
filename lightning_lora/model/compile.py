"""``torch.compile`` for each of a model's repeated blocks, in place: one graph serves them all.

A transformer is one block many times over, so compiling a block is quick and done once, and nothing outside it is traced (an
attention mask made under tracing made a whole compiled model slower than its blocks compiled one by one). Names and state-dict
keys stay: ``block.compile()`` puts a compiled call beside the module, not a module around it.

A block is compiled anew where its input needs no gradient (the first one, above a frozen embedding: a shorter graph; none if the model
has ``enable_input_require_grads()``), for evaluation, once merged, and when the batch's rows or length change for the first time: from
then on that size may be any. Gradient checkpointing and sharding stay around the compiled call, whichever came first.

Small steps take as long as the CPU needs to launch their kernels. With CUDA graphs each block's passes are recorded once and replayed by
one launch, from and to fixed memory: who trains so calls :func:`begin_step` before each batch and :func:`keep_gradients` after each
backward pass, as ``LoRACallback`` does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._functorch import config as autograd_config

from lightning_lora.ops import backends
from lightning_lora.utils.blocks import BLOCKS, repeated_blocks

GRAPHS = 64  # more than blocks of a few classes need for all of those


def compile_layers(model: nn.Module, backend: str | Callable[..., Any] = "inductor", cuda_graphs: bool = False) -> list[str]:
    """Compile each of a model's repeated blocks (:func:`~lightning_lora.utils.blocks.repeated_blocks`) in place; ones that are compiled
    already stay so.

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
        if cuda_graphs and not isinstance(block._compiled_call_impl, (_Recorded, type(None))):
            raise ValueError(
                f"{name} is compiled already, without CUDA graphs: call uncompile_layers(model) first, or leave cuda_graphs out."
            )
    # All modules' calls are one piece of code to the compiler, which counts graphs by that and after eight leaves it uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    # Linears of one input hand each other their outputs (layers/siblings.py). Without this the compiler leaves a block that does so inside
    # a checkpoint uncompiled: eager code would do it in the second forward pass too. Nothing of it is there once the block has returned.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    for block in blocks.values():
        if block._compiled_call_impl is None:
            block.compile(backend=_prepared(backend, cuda_graphs))
            if cuda_graphs:
                block._compiled_call_impl = _Recorded(block._compiled_call_impl)  # type: ignore[arg-type]  # compile() has set it
    return list(blocks)


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
    compile = lookup_backend(backend) if isinstance(backend, str) else backend
    options = {"config_patches": {"triton.cudagraphs": True}} if cuda_graphs else {}

    @functools.wraps(compile)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        with autograd_config.patch(_REBUILD):
            return compile(*args, **kwargs, **options)

    return prepared


def uncompile_layers(model: nn.Module) -> None:
    """Let every block run as written again; what was compiled is found again if they are compiled anew."""
    for _, block in repeated_blocks(model):
        block._compiled_call_impl = None
