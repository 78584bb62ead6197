"""The seconds of a training step, as a range: its FLOPs over a device's rate, times the shares of it that were reached.

The FLOPs are those of :mod:`lightning_lora.tasks.flops` and attention's: causal, 2·T²·d forward a block and row, d the width of all heads,
and 2.5 times as many backward.
"""

from __future__ import annotations

import copy
from typing import Any

from lightning_lora.config import LoRAConfig
from lightning_lora.estimate.setting import Setting
from lightning_lora.model.apply import apply_lora
from lightning_lora.tasks.flops import FlopsPerPosition
from lightning_lora.utils.blocks import repeated_blocks

#: Device → dense bf16 FLOPs a second, by its maker.
RATES = {"h200": 989e12, "h100": 989e12, "a100": 312e12, "4090": 165e12, "l4": 121e12}
# Shares of the rate that steps on an H200 reached (benchmarks/README.md): 1B eager 0.32, 8B compiled 0.58, with an FP8 base 0.8;
# a mixture's eager 2 × 2048 tokens 0.10, compiled 0.26.
DENSE, EXPERTS, FLOAT8 = (0.30, 0.62), (0.09, 0.30), (0.40, 0.88)


def estimate_seconds(model: Any, config: LoRAConfig | None, setting: Setting, device: str) -> tuple[float, float] | None:
    """Return the least and the most seconds that a step will take.

    Args:
        model: as for :func:`~lightning_lora.estimate.estimate_memory`.
        config: likewise.
        setting: of the run.
        device: "h200", "h100", "a100", "4090", "l4", or "cpu".

    Returns:
        The range; None for a CPU and in fp32, whose rates are not known.

    Raises:
        ValueError: the device is not known.

    Examples:
        >>> with torch.device("meta"):
        ...     empty = type(model)(model.config)
        >>> least, most = estimate_seconds(empty, LoRAConfig(rank=4), Setting(batch=2, length=16), "h200")
        >>> 0 < least < most
        True
    """
    if device != "cpu" and device not in RATES:
        raise ValueError(f"device={device!r} is not known; it is one of {', '.join(RATES)}, cpu")
    if device == "cpu" or setting.precision == "32-true":
        return None
    model = copy.deepcopy(model)
    if config is not None:
        apply_lora(model, config)
    flops, positions = FlopsPerPosition(model), setting.batch * setting.length
    blocks = [block for _, block in repeated_blocks(model)]
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads) if heads else 0
    attention = 2.0 * setting.batch * setting.length**2 * width * len(blocks)
    total = flops.total([(model, positions)], training=True) + 3.5 * attention
    if setting.checkpointing is not None:  # the blocks' forward pass again, without attention's if its results are kept
        total += flops.total([(block, positions) for block in blocks], training=False) + attention * (setting.checkpointing == "full")
    experts = any(p.dim() == 3 and p.shape[0] > 1 for block in blocks for name, p in block.named_parameters() if "conv" not in name)
    low, high = EXPERTS if experts else FLOAT8 if setting.quantize == "fp8" and device != "a100" else DENSE
    return total / RATES[device] / high, total / RATES[device] / low
