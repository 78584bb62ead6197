"""Advice that is code: a learning rate from the method, its scaling and the model's width, and what to look at beside it.

The starting point is "LoRA Without Regret" (Schulman et al., 2025, doi:10.64434/tml.20250929) and the formula that its authors fitted to
their sweeps (tinker-cookbook, ``hyperparam_utils.py``): full fine-tuning takes 5e-5 · (2000 / width)^0.781, LoRA ten times that at α = 32
with the scaling α/r, nearly independent of the rank. Runs of fewer than 100 steps take fifteen times.
"""

from __future__ import annotations

import platform
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.utils.messages import counted
from lightning_lora.utils.torch_private import cpu_multiplies_bfloat16

FULL, WIDTH, POWER = 5e-5, 2000, 0.781  # tinker-cookbook's formula for Llama models
TIMES, TIMES_SHORT, SHORT = 10, 15, 100  # LoRA's rate over full fine-tuning's, the same in short runs, and how many steps are short
ALPHA = 32  # α of the sweeps behind these numbers
BATCH = 32  # rows; LoRA tolerates larger batches less than full fine-tuning does (LoRA Without Regret; TRL's guide to it)
#: Variant → how many times LoRA's rate it takes, and why. Others take LoRA's.
VARIANTS: dict[str, tuple[float, str]] = {
    "vera": (10, "VeRA trains vectors that scale fixed matrices and takes ten times LoRA's (arXiv:2310.11454, section 4)"),
    "adalora": (8, "AdaLoRA's update is a product of three factors and starts smaller (configs/adalora.yaml)"),
}
#: Variants whose update has no α.
WITHOUT_ALPHA = frozenset({"vera"})
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Rate:
    """A learning rate with its reason.

    Attributes:
        value: the rate, of A under LoRA+.
        reason: how it came about, on one line.
    """

    value: float
    reason: str


def advise_learning_rate(
    model: nn.Module, *, lora_plus_ratio: float = 1.0, steps: float | None = None, galore_scale: float | None = None
) -> Rate:
    """Return an Adam learning rate to start with. It is a guess within a factor of two or three: a sweep around it finds the best.

    Args:
        model: adapted, or to be trained in full.
        lora_plus_ratio: λ of LoRA+: B then gets LoRA's rate, and A, whose rate this is, λ times less.
        steps: optimizer steps of the run, if they are known.
        galore_scale: GaLore's ``scale``, which multiplies its updates; None without GaLore.

    Returns:
        The rate after the warm-up, and the reason.

    Raises:
        ValueError: the model has no parameters with a width.

    Examples:
        >>> rate = advise_learning_rate(apply_lora(model), steps=1000)
        >>> optimizer = torch.optim.AdamW(lora_param_groups(model, lr=rate.value))  # rate.reason says why
    """
    layers = [layer for _, layer in lora_layers(model) if layer.low_rank]
    width = _width(model, layers)
    rate = FULL * (WIDTH / width) ** POWER
    reasons = [f"full fine-tuning's {rate:.1e} at width {width}"]
    if not layers:
        if galore_scale is not None:
            rate /= galore_scale
            reasons.append(f"divided by GaLore's scale {galore_scale:g}")
        return _rounded(rate, reasons)
    times = TIMES_SHORT if steps is not None and steps < SHORT else TIMES
    rate *= times
    reasons.append(f"times {times} for LoRA" + (f" in fewer than {SHORT} steps" if times == TIMES_SHORT else ""))
    variant = layers[0].lora_config.variant
    if variant not in WITHOUT_ALPHA:
        # Adam's steps do not depend on the gradient's size. So the update grows with α·(B's rate) where α is scaling · rank.
        alpha = statistics.median(layer.scaling * layer.rank for layer in layers)
        rate *= ALPHA / alpha
        reasons.append(f"times {ALPHA}/{alpha:g} for scaling · rank = {alpha:g}")
    if variant in VARIANTS:
        factor, why = VARIANTS[variant]
        rate *= factor
        reasons.append(f"times {factor:g}: {why}")
    if lora_plus_ratio != 1:
        rate /= lora_plus_ratio
        reasons.append(f"divided by lora_plus_ratio={lora_plus_ratio:g}: the rate is A's, B gets LoRA's")
    return _rounded(rate, reasons)


def advise_setup(model: nn.Module, batch: int | None = None, device: str | None = None) -> list[str]:
    """Return one line each on an adapted model's layers, its rank and the effective batch: what is set, and what speaks for another choice.

    Args:
        model: adapted.
        batch: rows per optimizer step over all processes, if known.
        device: type of device that it trains on, if known. A line warns of weights that it multiplies slowly.
    """
    layers = [layer for _, layer in lora_layers(model) if layer.low_rank]
    ranks = sorted({layer.rank for layer in layers})
    parameters = sum(p.numel() for layer in layers for p in layer.lora_parameters().values())
    adapted = sum(1 for layer in layers if isinstance(layer, nn.Linear))
    linears = sum(1 for module in model.modules() if isinstance(module, nn.Linear))
    few = " 'all-linear' learns more from the same number of parameters, above all in the MLPs." if adapted < linears / 2 else ""
    lines = [f"target_modules: {adapted} of {linears} linear layers.{few}"] if linears else []
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    lines.append(
        f"rank: {rank}, {parameters:,} adapter parameters: room for about {2 * parameters:,} answer tokens (2 bits per parameter, 1 per"
        " token); more data wants a higher rank, at the same learning rate."
    )
    if batch is not None:
        large = f" Above {BATCH}, LoRA learns less per row than full fine-tuning." if batch > BATCH else ""
        lines.append(f"effective batch: {counted(batch, 'row')}.{large}")
    slow = next((layer.weight.dtype for layer in layers if getattr(layer, "weight", None) is not None and layer.weight.dtype in HALF), None)
    if slow and device is not None and multiplies_half_slowly(device):
        lines.append(
            f"dtype: {str(slow).removeprefix('torch.')}, for which this processor has no instructions; float32 is several times as fast."
        )
    return lines


def multiplies_half_slowly(device: str) -> bool:
    """Return True if a device of this type is this machine's processor, and computes 16-bit numbers by converting each.

    Known of x86 processors only: without instructions for bfloat16, a product of 512×576 and 576×1536 took four times float32's time.
    """
    return device == "cpu" and platform.machine() in ("x86_64", "AMD64") and not cpu_multiplies_bfloat16()


def _rounded(rate: float, reasons: list[str]) -> Rate:
    return Rate(float(f"{rate:.2g}"), ", ".join(reasons))


def _width(model: nn.Module, layers: list[LoRALayer]) -> int:
    """Return the model's width: its config's ``hidden_size``, or the commonest size of the adapted or trained matrices."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if isinstance(size := getattr(text, "hidden_size", None), int):
            return size
    sizes: Counter[int] = Counter()
    for layer in layers:
        sizes.update(size for p in layer.lora_parameters().values() for size in p.shape[:2] if size not in (1, layer.rank))
    if not sizes:
        sizes.update(size for p in model.parameters() if p.ndim > 1 for size in p.shape[:2])
    if not sizes:
        raise ValueError(f"{type(model).__name__} has no matrices to take a width from; give the learning rate as a number.")
    return max(sizes, key=lambda size: (sizes[size], size))
