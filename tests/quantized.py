"""Quantized bases that the tests share: one layer or model a format, and what they dequantize to.

A row of a kind × variant suite is ``packed_linear(name)`` for every name in ``QUANTIZERS``: adapt it, and take ``layer.base_weight()``
where the definition has W. Tolerances are those of the dtype, except for "int8", whose evaluation pass quantizes the input as well.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from lightning_lora import quantize_base
from lightning_lora.ops.frozen_weight import FrozenWeight, reader_of
from lightning_lora.quantization.formats import format_of

for library in ("bitsandbytes.backends.cpu.ops", "torchao"):  # they warn that they look for extra kernels
    logging.getLogger(library).setLevel(logging.ERROR)

QUANTIZERS = ["nf4", "int8", "torchao-nf4", "torchao-int8", "fp8"]
BITSANDBYTES = ["nf4", "int8"]


class Stack(nn.Module):
    """Norm → two linears, one with a bias → head; sizes that every format can pack."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128, bias=False)
        self.head = nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.up(self.norm(x)).relu()))


def plain_stack(dtype: torch.dtype = torch.float32) -> Stack:
    torch.manual_seed(5)
    return Stack().to(dtype)


def packed_stack(how: str, dtype: torch.dtype = torch.float32) -> Stack:
    """The same weights with the two inner linears packed."""
    return quantize_base(plain_stack(dtype), how, targets=["up", "down"])


def packed_linear(how: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(6)
    return quantize_base(nn.Sequential(nn.Linear(128, 256, bias=bias)).to(dtype), how)[0]


def linear4bit(out: int, width: int, kind: str = "nf4", nested: bool = True, bias: bool = False, **options: Any) -> Any:
    """A layer of bitsandbytes itself, packed; ``options`` are its own."""
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(out)
    layer = Linear4bit(width, out, bias, compress_statistics=nested, quant_type=kind, **options).to("cpu").requires_grad_(False)
    layer.support_avx512bf16_for_cpu = False
    return layer


def stored4bit(*shape: int, **options: Any) -> tuple[FrozenWeight, torch.Tensor]:
    """A 4-bit weight as an operation takes it, and what it unpacks to."""
    layer = linear4bit(*shape, **options)
    storage = reader_of(type(layer))
    assert storage is not None
    weight = storage.read(layer, torch.empty(0, shape[1], dtype=layer.weight.quant_state.dtype))
    assert weight is not None
    return weight, format_of(layer).dequantize(layer)  # type: ignore[union-attr]


def inputs(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 128, generator=torch.Generator().manual_seed(9))
