"""Checkpoint a model's repeated blocks: keep little for the backward pass, and compute the rest again there.

What is kept of a block beside its inputs is a choice. Attention is the dearest to compute again: over rows of T tokens, each number of its
result takes T multiplications (half of them where attention is causal, in the forward pass alone), and one of a linear's as many as the
linear has inputs. So ``keep="attention"`` keeps attention's results, which are as large as the block's input, and computes everything else
again. On rows of 32,768 tokens of an 8B model that saves a tenth of the step. To keep what the linears return too would take ten times as
much memory: compile the blocks without checkpoints then, since the compiler computes elementwise results again by itself.

Torch's ``checkpoint`` and its selective contexts do it. They are called inside the block's forward. So they are part of a compiled
block's graph, and hooks on the block (FSDP2's) run once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_lora.layers.classes import strip_class
from lightning_lora.utils.blocks import BLOCKS, repeated_blocks
from lightning_lora.utils.transformers_conventions import CACHES, checkpoints_itself

Keep = Literal["inputs", "attention"]


def checkpoint_layers(model: nn.Module, *, keep: Keep = "attention") -> Checkpointing:
    """Checkpoint each of a model's repeated blocks (:func:`~lightning_lora.utils.blocks.repeated_blocks`), from its next forward pass on.

    Gradients are the same: random numbers are drawn as in the forward pass. Without gradients (validation) nothing changes. Copies and
    pickles of the model have no checkpoints.

    Args:
        model: any module, wrapped or not. Blocks may be compiled before or after by :func:`~lightning_lora.compile_layers`.
        keep: what a block keeps for the backward pass: "inputs" alone, or "attention"'s results too, if one operation computes them
            (torch's ``scaled_dot_product_attention``, FlashAttention; not attention that is written out).

    Returns:
        A handle; its ``remove()`` ends it.

    Raises:
        ValueError: the model has no repeated blocks, or checkpoints its blocks itself.

    Examples:
        >>> handle = checkpoint_layers(apply_lora(model))
        >>> model(**batch, use_cache=False).loss.backward()
        >>> handle.remove()
    """
    if keep not in ("inputs", "attention"):
        raise ValueError(f"keep={keep!r} is not known; it is 'inputs' or 'attention'.")
    blocks = repeated_blocks(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no repeated blocks to checkpoint ({BLOCKS}): leave checkpointing out.")
    doubled = next((name for name, module in model.named_modules() if checkpoints_itself(module) or isinstance(module, Checkpointed)), None)
    if doubled is not None:
        raise ValueError(
            f"{doubled or type(model).__name__} has gradient checkpointing switched on already: switch it off"
            " (model.gradient_checkpointing_disable(); the task's gradient_checkpointing: false), or leave checkpointing out."
        )
    for _, block in blocks:
        block.__dict__["kept_for_backward"] = keep
        block.__class__ = _checkpointed_class(type(block))
    return Checkpointing([block for _, block in blocks])


class Checkpointing:
    """The checkpointing of some blocks."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks

    def remove(self) -> None:
        """End it. A backward pass that is still to come works."""
        for block in self.blocks:
            if isinstance(block, Checkpointed):
                block.__dict__.pop("kept_for_backward", None)
                block.__class__ = strip_class(type(block), "checkpointed_base")
        self.blocks = []


class Checkpointed(nn.Module):
    """Mixin before the class of a block: its forward runs in a checkpoint where gradients are computed."""

    kept_for_backward: Keep

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Skip the base's ``__init_subclass__``, which may wrap ``forward`` again: this is not a subclass that the user defined."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original class's forward in a checkpoint.

        Raises:
            RuntimeError: the block is given a cache with tokens in it, to which computing it again would add them twice.
        """
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        for name in CACHES:
            cache = kwargs.get(name)
            if cache is not None:
                if cache.get_seq_length():
                    raise RuntimeError(f"{name} holds tokens, and a checkpointed block would add its own twice: pass use_cache=False.")
                kwargs[name] = None
        options: dict[str, Any] = {"context_fn": _contexts} if self.kept_for_backward == "attention" else {}
        return checkpoint(super().forward, *args, use_reentrant=False, **options, **kwargs)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what an attention kernel returns, torch's or another library's: all of their operators say so in their names."""
    name = str(op)
    return CheckpointPolicy.MUST_SAVE if "attention" in name or "attn" in name else CheckpointPolicy.PREFER_RECOMPUTE


_contexts: Callable[[], Any] = partial(create_selective_checkpoint_contexts, _policy)
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _checkpointed_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the checkpointed subclass of ``base``, with its name. All blocks share it, so that one compiled graph serves them."""
    if base not in _CLASSES:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "checkpointed_base": base, "__reduce_ex__": _reduce}
        _CLASSES[base] = type(base.__name__, (Checkpointed, base), names)
    return _CLASSES[base]


def _reduce(module: Any, protocol: Any) -> Any:
    """Copy and pickle as the original class."""
    base = type(module).checkpointed_base
    state = {name: value for name, value in module.__getstate__().items() if name != "kept_for_backward"}
    return _new, (base,), state


def _new(base: type[nn.Module]) -> nn.Module:
    return base.__new__(base)
