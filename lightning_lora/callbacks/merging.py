"""The merge at the end of ``fit``: what would prevent it is refused in ``setup``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.state import Quantized
from lightning_lora.model.merge import merge_lora, merge_report
from lightning_lora.model.targeting import TargetReport
from lightning_lora.model.ties import tied_weights
from lightning_lora.quantization.formats import format_of
from lightning_lora.strategies.lightning_private import left_masked
from lightning_lora.strategies.namespaces import twins
from lightning_lora.utils.messages import counted
from lightning_lora.utils.names import join


def check_mergeable(target: nn.Module, report: TargetReport, strategy: Strategy, quantize: str | None, how: Quantized | None) -> None:
    """Refuse at the start what would prevent the merge at the end.

    Args:
        target: the module to adapt, or that is adapted already.
        report: what the config matches in it.
        strategy: the trainer's strategy.
        quantize: format that the base will be quantized to before; None: it stays as it is.
        how: how to merge into a quantized weight; None: not at all.

    Raises:
        ValueError: an update can never be merged; a weight is tied; or it is quantized, and ``how`` is None or cannot be applied to it.
    """
    sharded = isinstance(strategy, twins(ModelParallelStrategy))
    followed = {t.spec.rows_of for t in report.rows}
    kinds = {t.module: t.kind for t in (*report.targets, *(t for t in report.rows if not t.spec.rows_of and t.fqn not in followed))}
    for fqn, module in target.named_modules():
        if (reason := kinds[module].never_merges(module) if module in kinds else None) is not None:
            raise ValueError(
                f"{fqn!r} cannot be merged at the end of fit: {reason}, with LoRACallback(merge_on_fit_end=False), in YAML"
                " lora: {merge_on_fit_end: false}."
            )
    parts = {
        join(fqn, name): (module, getattr(module, name))
        for fqn, module in target.named_modules()
        if (kind := kinds.get(module)) is not None
        for name in kind.adapted
        if not (isinstance(module, LoRALayer) and module.by_weight()[name].merged)
    }
    quantized = "quantized and will be sharded" if sharded else "quantized"
    tied = tied_weights(target, {name: weight for name, (_, weight) in parts.items()})
    reasons = {name: f"tied to {', '.join(others)}, which merging would change too" for name, others in tied.items()}
    for name, (module, weight) in parts.items():
        if not weight.is_floating_point() or format_of(module) is not None:
            if how is None or format_of(module) is None or sharded:
                reasons.setdefault(name, f"{quantized} ({weight.dtype})")
        elif quantize is not None and (how is None or sharded):
            reasons.setdefault(name, f"{quantized} ({quantize})")
    if reasons:
        name, reason = next(iter(reasons.items()))
        raise ValueError(
            f"{name} is {reason}: it cannot be merged at the end of fit. Pass LoRACallback(merge_on_fit_end=False). To merge tied weights"
            " later, call merge_lora(model, untie=True). To merge into a quantized base, pass LoRACallback(merge_quantized='dequantize') or"
            " 'requantize'."
        )


def check_callbacks(module: LightningModule, report: TargetReport, callbacks: Sequence[Callback], merge: bool) -> None:
    """Raise ValueError if a callback would train the weights under adapters, or mask them and ``merge``."""
    backbone = getattr(module, "backbone", None)
    inside = {*backbone.modules()} if isinstance(backbone, nn.Module) else set()
    unfreezing = next((callback for callback in callbacks if isinstance(callback, twins(BackboneFinetuning))), None)
    if unfreezing is not None and any(target.module in inside for target in report.targets):
        raise ValueError(
            f"callbacks: {type(unfreezing).__name__} would unfreeze the backbone, and train the weights under its adapters too. Leave it"
            " out: LoRA trains the backbone's adapters from the start."
        )
    if merge:
        check_not_masked(module, report, callbacks)


def check_not_masked(module: LightningModule, report: TargetReport, callbacks: Sequence[Callback]) -> None:
    """Raise ValueError if ``ModelPruning`` leaves its mask on a weight that is to be merged: it would be computed anew at each call."""
    masked = {(owner, name) for callback in callbacks for owner, name in left_masked(callback, module)}
    for target in report.targets:
        for name in target.kind.adapted:
            if (target.module, name) in masked:
                raise ValueError(
                    f"ModelPruning(make_pruning_permanent=False) leaves a mask on {target.fqn}.{name}, so it cannot be merged at the end of"
                    " fit: make the pruning permanent, or pass LoRACallback(merge_on_fit_end=False)."
                )


def merge_and_log(target: nn.Module, device: torch.device, how: Quantized | None, max_lost: float | None) -> None:
    """Merge layer by layer on a device, and log what rounding lost at most; see :func:`~lightning_lora.merge_lora`."""
    merge_lora(target, device=device, quantized=how, max_lost=max_lost)
    lost = merge_report(target)
    worst = max(lost, key=lambda name: lost[name])
    rank_zero_info(f"LoRA merged into {counted(len(lost), 'module')}; rounding lost at most {lost[worst]:.2%} of an update ({worst}).")
