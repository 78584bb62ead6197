"""Load a plain weight into a layer that was quantized before it had one, on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.quantization.formats import format_of, remember
from lightning_lora.quantization.quantizers import quantizer_of
from lightning_lora.utils.checksums import sampled_digest

_BY = "_quantized_as"


def remember_format(module: nn.Module, how: str) -> None:
    """Record what a layer without a weight was quantized as, by its name in ``quantize``."""
    module.__dict__[_BY] = how


def awaits_weight(module: nn.Module) -> bool:
    """True if a layer was quantized without a weight, and has got none since."""
    return _BY in module.__dict__


@torch.no_grad()
def load_packed(module: Any, weight: Tensor, device: torch.device) -> None:
    """Quantize a full plain weight into a layer that was quantized without one, whole or sharded.

    Args:
        module: a layer that :func:`awaits_weight`; it has memory by now.
        weight: (out, in), in floating point.
        device: where to quantize.
    """
    packing = format_of(module)
    assert packing is not None and awaits_weight(module)
    made = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    plain = weight.to(device, packing.unpacked_dtype(module))
    made._parameters["weight"] = nn.Parameter(plain, requires_grad=False)
    remember(module, sampled_digest(plain))
    quantizer_of(module.__dict__[_BY]).pack(made, device)
    packing.take_over(module, made)
    del module.__dict__[_BY]
