"""Checks before the callback changes anything: it refuses, or warns of, what would only go wrong in training or at its end."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.state import Quantized
from lightning_lora.model.heads import left_frozen
from lightning_lora.model.targeting import TargetReport
from lightning_lora.model.ties import tied_weights
from lightning_lora.quantization.formats import format_of


def check_apart(mine: str | None, others: Sequence[str | None]) -> None:
    """Several callbacks have to adapt parts that lie apart.

    Args:
        mine: a callback's ``module``.
        others: the other callbacks'.

    Raises:
        ValueError: one is inside another.
    """
    for other in others:
        short, long = sorted((mine or "", other or ""), key=len)
        if f"{long}.".startswith(f"{short}." if short else ""):
            raise ValueError(
                f"callbacks: one LoRACallback has module={mine!r} and another module={other!r}, which do not lie apart: give each a"
                " module= of its own, or use one callback with rank_pattern and alpha_pattern."
            )


def check_mergeable(target: nn.Module, report: TargetReport, strategy: Strategy, quantize: str | None, how: Quantized | None) -> None:
    """Say at the start what would stop the merge at the end.

    Args:
        target: the module that is to be adapted, or is.
        report: what of it.
        strategy: that it will be trained under.
        quantize: what it will be packed as before.
        how: to merge into a quantized weight.

    Raises:
        ValueError: a weight is tied, or quantized and ``how`` does not say how to merge into it.
    """
    sharded = isinstance(strategy, ModelParallelStrategy)
    kinds = {t.module: t.kind for t in report.targets}
    parts = {
        f"{fqn}.{name}" if fqn else name: (module, getattr(module, name))
        for fqn, module in target.named_modules()
        if (kind := kinds.get(module)) is not None
        for name in kind.adapted
        if not (isinstance(module, LoRALayer) and module.by_weight()[name].merged)
    }
    quantized = "quantized and will be sharded" if sharded else "quantized"
    tied = tied_weights(target, {name: weight for name, (_, weight) in parts.items()})
    reasons = {name: f"tied to {', '.join(others)}, and merging would change that too" for name, others in tied.items()}
    for name, (module, weight) in parts.items():
        if not weight.is_floating_point() or format_of(module) is not None:
            if how is None or format_of(module) is None or sharded:
                reasons.setdefault(name, f"{quantized} ({weight.dtype})")
        elif quantize is not None and (how is None or sharded):
            reasons.setdefault(name, f"{quantized} ({quantize})")
    if reasons:
        name, reason = next(iter(reasons.items()))
        raise ValueError(
            f"{name} is {reason}: it cannot be merged at the end of fit. Pass LoRACallback(merge_on_fit_end=False);"
            " merge_lora(model, untie=True) merges tied weights when you want it, LoRACallback(merge_quantized='dequantize') or"
            " 'requantize' says how to merge into a quantized base."
        )


def recordable(strategy: Strategy) -> bool:
    """Whether CUDA graphs, which were asked for, can be had.

    Raises:
        ValueError: never under this strategy.
    """
    if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
        raise ValueError(
            f"cuda_graphs=True with strategy={type(strategy).__name__}: it moves the parameters between uses, and a recorded graph reads"
            " them where they were. Leave cuda_graphs out."
        )
    device = strategy.root_device
    if device.type != "cuda":
        rank_zero_warn(f"cuda_graphs=True has no effect on {device}: blocks are compiled, nothing is recorded.")
    return device.type == "cuda"


def frozen_parts(target: nn.Module, report: TargetReport, config: LoRAConfig, *, whole: bool) -> str:
    """Return the names of a LightningModule's own parts that LoRA freezes, and warn: a head beside a pretrained part would stay random.

    Args:
        target: what is adapted.
        report: what the config means for it.
        config: says in ``modules_to_save`` which parts train in full.
        whole: whether the target is the whole LightningModule.
    """
    stays = left_frozen(target, [each.fqn for each in report.targets], report.saved)
    named = ", ".join(stays[:6]) + (" …" if len(stays) > 6 else "")
    if stays and whole and (config.modules_to_save == "auto" or report.saved):
        rank_zero_warn(
            f"LoRA freezes {named}, which have no adapter: what is new there stays random. To train it, limit LoRA to the pretrained"
            " part with LoRACallback(module=...), or name it in modules_to_save. If it is to stay as it is, say so with"
            " requires_grad_(False) before, or with modules_to_save=[]."
        )
    return named
