"""Turn a plain linear into one of bitsandbytes' quantized layers, in place: ``quantize="nf4"`` and ``"int8"``.

How such a layer is read is in :mod:`lightning_lora.quantization.bitsandbytes`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from lightning_lora.quantization.bitsandbytes import library_of, move_together
from lightning_lora.quantization.quantizers import QUANTIZERS, Quantizer


def quantize_nf4(linear: Any, device: torch.device) -> None:
    """Quantize to 4-bit NormalFloat with double quantization. The layer computes in the weight's original dtype."""
    modules = library_of().nn
    made = modules.Linear4bit(1, 1, linear.bias is not None, linear.weight.dtype, True, "nf4", device="meta")
    options: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4", "module": linear}
    data = linear.weight.data
    if data.is_meta:  # a move to there quantizes nothing
        options |= {"quant_state": _empty_state(data.shape, data.dtype), "bnb_quantized": True}
        data = torch.empty(-(-data.numel() // 2), 1, dtype=torch.uint8, device="meta")
    _become(linear, made, modules.Params4bit(data, requires_grad=False, **options), device)
    linear.quant_state = linear.weight.quant_state


def _empty_state(shape: torch.Size, dtype: torch.dtype, block: int = 64, outer_block: int = 256) -> Any:
    """Describe an NF4 weight with double quantization on the meta device. The library's function would keep its tables there for ever."""
    make, empty = library_of().functional.QuantState, functools.partial(torch.empty, device="meta")
    scales = -(-shape.numel() // block)
    outer = make(empty(-(-scales // outer_block)), code=empty(256), blocksize=outer_block, dtype=torch.float32)
    return make(empty(scales, dtype=torch.uint8), shape, empty(16), block, "nf4", dtype, empty(()), outer)


def quantize_int8(linear: Any, device: torch.device) -> None:
    """Quantize to 8 bits with one scale per row. Inputs above 6 are multiplied in 16 bits, as in LLM.int8()."""
    modules = library_of().nn
    made = modules.Linear8bitLt(1, 1, linear.bias is not None, has_fp16_weights=False, threshold=6.0, device="meta")
    codes, scales, _ = library_of().functional.int8_vectorwise_quant(linear.weight.data.to(device, torch.float16))
    codes, scales = codes.to(linear.weight.device), scales.to(linear.weight.device)
    linear._unpacked_dtype = linear.weight.dtype
    _become(linear, made, modules.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales), linear.weight.device)
    move_together(linear)


def _become(linear: Any, made: Any, weight: Any, device: torch.device) -> None:
    """Turn a linear into a layer of the library's class, in place. Module, name and bias stay the same.

    Args:
        linear: the layer to change.
        made: a new layer of the library, whose class, hooks and attributes it gets.
        weight: its new weight, quantized by the move to ``device``.
        device: device to quantize on. The weight then returns to its original device.
    """
    home = linear.weight.device
    linear.__class__ = type(made)
    linear._load_state_dict_pre_hooks.update(made._load_state_dict_pre_hooks)
    linear.__dict__.update({name: value for name, value in made.__dict__.items() if name not in linear.__dict__})
    linear._parameters["weight"] = weight.to(device).to(home)


QUANTIZERS["nf4"] = Quantizer(quantize_nf4, library_of, "Linear4bit", float64=False, on_meta=True)
QUANTIZERS["int8"] = Quantizer(quantize_int8, library_of, "Linear8bit")
