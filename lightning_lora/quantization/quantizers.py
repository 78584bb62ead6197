"""What ``quantize=`` names: each turns a linear into a quantized layer. How the layer is then read is its format, see ``formats.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_lora.registry import look_up

QUANTIZERS: dict[str, Quantizer] = {}  # quantize=… → what quantizes a linear; experts: STACK_FORMATS of stacks.py


@dataclass(frozen=True)
class Quantizer:
    """One way to quantize a plain linear.

    Attributes:
        pack: quantizes the layer's weight in place, computing on a device. The quantized weight is on the plain one's device.
        check_installed: imports the library, or raises ImportError that names the extra to install.
        makes: the format, as `lightning_lora.quantization.content.packed_digest` names it.
        unit: number that the count of the weight's entries must be a multiple of.
        float64: True if it quantizes weights of float64.
        on_meta: True if ``pack`` makes an empty quantized layer of one on the meta device, to be filled later.
    """

    pack: Callable[[nn.Linear, torch.device], None]
    check_installed: Callable[[], Any]
    makes: str
    unit: int = 1
    float64: bool = True
    on_meta: bool = False


def quantizer_of(name: str) -> Quantizer:
    """Return the quantizer for a format, by its name in ``quantize``.

    Raises:
        ValueError: the name is unknown. The message lists the known names.
    """
    return look_up(QUANTIZERS, "quantize", name)
