"""The NF4 kernel gives bitsandbytes' weight to the bit, and is called where it runs.

On CPUs with AVX512, bitsandbytes 0.50 reads the scales of some weights from the wrong blocks: if rows are not whole blocks, or blocks have
2048 entries or more. So without a GPU the kernel is compared with the definition.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes import functional

from lightning_lora.ops import backends
from lightning_lora.quantization.bitsandbytes import FrozenWeight4bit, Layout4bit
from tests.ops.operands import DEVICE, tensor

pytest.importorskip("triton")
from lightning_lora.ops import triton_nf4

# The interpreter truncates to bf16 where a GPU rounds.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def packed(shape: tuple[int, int], block: int, nested: bool, kind: str = "nf4") -> tuple[FrozenWeight4bit, Any]:
    codes, state = functional.quantize_4bit(tensor(*shape) * 3, blocksize=block, compress_statistics=nested, quant_type=kind)
    tensors, details = [codes, state.absmax, state.code], Layout4bit(kind, block, *shape)
    if nested:
        tensors, details = [*tensors, state.offset, state.state2.absmax, state.state2.code], details._replace(outer_block=256)
    return FrozenWeight4bit(tensors, details, state), state


def defined(weight: FrozenWeight4bit, state: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Code after code, each the entry of its value times the scale of its block."""
    codes, _, values, *_ = weight.tensors
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    entries = values[torch.stack((codes >> 4, codes & 15), -1).flatten().long()][: state.shape.numel()]
    return (entries * scales.repeat_interleave(state.blocksize)[: len(entries)]).view(state.shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("shape", "block"), [((96, 192), 64), ((3, 64), 64), ((257, 128), 128), ((8, 2048), 4096)])
def test_it_is_bitsandbytes_to_the_bit(shape: tuple[int, int], block: int, nested: bool, dtype: torch.dtype) -> None:
    weight, state = packed(shape, block, nested)
    state.dtype = dtype
    _, _, *_, outer_block = weight.details
    found = triton_nf4.dequantize(weight.tensors, shape, block, outer_block, dtype)
    assert found.dtype == dtype and torch.equal(found, defined(weight, state, dtype))
    if DEVICE == "cuda":
        assert torch.equal(found, functional.dequantize_4bit(weight.tensors[0], state))


@pytest.mark.parametrize(
    ("kind", "shape", "called"), [("nf4", (6, 32), True), ("fp4", (6, 64), False), ("nf4", (5, 33), False)], ids=["nf4", "fp4", "odd"]
)
def test_it_serves_whole_blocks_of_nf4(kind: str, shape: tuple[int, int], called: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, usable = [], triton_nf4.dequantize
    monkeypatch.setattr(backends, "runs_kernels", lambda device: True)
    monkeypatch.setattr(triton_nf4, "dequantize", lambda *given: calls.append(given) or usable(*given))
    weight, state = packed(shape, 64, True, kind)
    assert torch.equal(weight.dense(torch.float32), defined(weight, state))
    assert bool(calls) is called
