"""bitsandbytes: ``Linear4bit`` (NF4 and FP4, QLoRA arXiv:2305.14314) and ``Linear8bitLt`` (LLM.int8(), arXiv:2208.07339).

Both store a quantized weight in a Parameter subclass and quantize when they are moved to a device, the CPU included. A layer that gets
adapters is quantized at once, so that its state does not depend on whether it was moved before.

The library hardly documents the names used here, hence ``bitsandbytes<0.51``. If one of these disappears, this fails:

- ``QuantState``'s constructor and attributes, from which a 4-bit weight is read and rebuilt: NF4 layers raise.
- ``packing_format_for_cpu`` and ``support_avx512bf16_for_cpu``: on CPUs with AVX512-BF16 an evaluation pass rewrites a 4-bit weight, and
  training after it raises in the backward pass.
- ``Params4bit``'s and ``Int8Params``' keywords, and ``MatmulLtState``'s fields: quantizing or requantizing raises.
- ``_load_state_dict_pre_hooks`` (torch's), by which a layer loads quantized weights: a layer that was quantized in place loads none.

On CPUs with AVX512, bitsandbytes 0.50 reads a 4-bit weight wrong whose rows are not whole blocks (in = 96 with blocks of 64): it takes
scales of other blocks. GPUs read it right. An adapted layer computes with what its base computes with, there and here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.ops import backends
from lightning_lora.ops.frozen_weight import WEIGHT_LAYOUTS, WEIGHT_READERS, FrozenWeight, WeightLayout, WeightReader
from lightning_lora.quantization.formats import QUANTIZED_FORMATS, QuantizedFormat
from lightning_lora.utils.autocast import autocast_dtype
from lightning_lora.utils.sharding import full_tensor, is_sharded, local_shard, local_tensor


def library_of() -> ModuleType:
    """Import bitsandbytes, or raise ImportError that names the extra."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError("this quantization needs the package bitsandbytes; pip install 'lightning-lora[bitsandbytes]'") from error
    return bitsandbytes


class Linear4bitFormat(QuantizedFormat):
    """Format of ``Linear4bit``: blocks of 64 values share a scale. With double quantization the scales are 8-bit themselves."""

    shards = True
    attributes = ("quant_state", "quant_storage", "compute_dtype", "compute_type_is_set", "support_avx512bf16_for_cpu")
    plain_class = nn.Linear

    def is_quantized(self, module: Any) -> bool:
        """True from the layer's first move to a device."""
        return _state(module) is not None

    def refusal(self, module: Any) -> str | None:
        """Return a reason if bitsandbytes has rewritten the weight for inference."""
        if getattr(_state(module), "packing_format_for_cpu", False):
            return (
                "an evaluation pass on the CPU rewrote its 4-bit weight for inference, which cannot be trained through: load the"
                " model again and apply LoRA first"
            )
        return None

    def prepare(self, module: Any, dtype: torch.dtype | None) -> None:
        """Quantize the weight on its current device, and keep bitsandbytes from rewriting it.

        On CPUs with AVX512-BF16 a pass in evaluation mode rewrites the weight for inference, permanently. The scales are then rounded
        to bf16 and the layer has no backward pass.
        """
        module.support_avx512bf16_for_cpu = False
        if _state(module) is None and module.weight.device.type != "meta":
            module.weight = module.weight.to(module.weight.device)
        module.quant_state = _state(module)

    def dequantize(self, module: Any) -> Tensor:
        """Return the weight in the dtype it was quantized from."""
        return library_of().functional.dequantize_4bit(module.weight.data, _state(module))

    def requantize(self, module: Any, weight: Tensor) -> None:
        """Quantize with the same data type, block size and double quantization."""
        old = module.weight
        fields = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        weight = weight.to(_state(module).dtype)
        new = library_of().nn.Params4bit(weight, requires_grad=False, module=module, **{name: getattr(old, name) for name in fields})
        module._parameters["weight"] = new.to(old.device)  # also sets module.quant_state

    def codes(self, module: Any) -> list[Tensor]:
        """Return the 4-bit codes and the scales."""
        return [full_tensor(module.weight.detach()).as_subclass(Tensor).view(torch.uint8), _state(module).absmax]

    def unpacked_dtype(self, module: Any) -> torch.dtype:
        """Return the dtype that the weight dequantizes to."""
        dtype: torch.dtype = _state(module).dtype
        return dtype

    def take_over(self, module: Any, other: Any) -> None:
        """Take the codes, or this rank's piece of them, and all scales."""
        if is_sharded(module.weight):
            local_tensor(module.weight).copy_(local_shard(other.weight.data, module.weight))
        else:
            module._parameters["weight"] = other.weight
            other.weight.module = module
        module.quant_state = other.quant_state


def _state(module: Any) -> Any:
    """Return scales and shape of a 4-bit weight.

    They are on the weight. The layer keeps them too, because FSDP puts a plain tensor in the weight's place.
    """
    state = getattr(module.weight, "quant_state", None)
    return module.quant_state if state is None else state


class Layout4bit(NamedTuple):
    """What a 4-bit weight is besides its tensors.

    Attributes:
        kind: data type, nf4 or fp4.
        block: entries of the weight that share a scale.
        rows: out.
        columns: in.
        outer_block: scales that share a scale of their own; 0 without double quantization.
    """

    kind: str
    block: int
    rows: int
    columns: int
    outer_block: int = 0


class FrozenWeight4bit(FrozenWeight):
    """The weight that ``Linear4bit.forward`` multiplies by, dequantized to the computing dtype again in each pass.

    Args:
        tensors: the 4-bit codes, their scales and the 16 values; with double quantization also the scales' offset, scales and values.
        details: the rest of its layout.
        state: bitsandbytes' description of the weight, if there is one.
    """

    def __init__(self, tensors: Sequence[Tensor], details: Layout4bit, state: Any = None) -> None:
        self.tensors, self.details, self.state = tuple(tensors), details, state

    @property
    def layout(self) -> str:  # type: ignore[override]
        """Return the layout's name and the details."""
        words = [str(word) for word in self.details if word]
        return " ".join(["bitsandbytes-4bit-nested" if self.details.outer_block else "bitsandbytes-4bit", *words])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight, a new tensor."""
        kind, block, rows, columns, outer_block = self.details
        if kind == "nf4" and rows * columns % block == 0 and backends.runs_kernels(self.tensors[0].device):
            from lightning_lora.ops import triton_nf4

            return triton_nf4.dequantize(self.tensors, (rows, columns), block, outer_block, dtype)
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(self.tensors[0].view(-1, 1), self._state_in(dtype))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x·Wᵀ + b``. For few rows the library chooses a kernel that dequantizes while it multiplies."""
        bias = None if bias is None else bias.to(x.dtype)
        if x.shape[0] > _MOST_ROWS:  # the library would do the same, with more Python calls
            return F.linear(x, self.dense(x.dtype), bias)
        import bitsandbytes

        return bitsandbytes.matmul_4bit(x, self.tensors[0], self._state_in(x.dtype), bias=bias)

    def _state_in(self, dtype: torch.dtype) -> Any:
        """Return a description with this dtype as the one to dequantize to."""
        if self.state is not None and self.state.dtype == dtype:
            return self.state
        make, (kind, block, rows, columns, outer_block) = library_of().functional.QuantState, self.details
        _, absmax, values, *nested = self.tensors
        offset = scales = None
        if nested:
            offset, outer, outer_values = nested
            scales = make(outer, code=outer_values, blocksize=outer_block, dtype=torch.float32)
        return make(absmax, torch.Size((rows, columns)), values, block, kind, dtype, offset, scales)


_MOST_ROWS = 1536  # the most rows for which bitsandbytes has such kernels


def _made4bit(tensors: Sequence[Tensor], words: tuple[str, ...]) -> FrozenWeight4bit:
    """Build a weight from its tensors and the words of its layout."""
    return FrozenWeight4bit(tensors, _details(words))


@functools.cache
def _details(words: tuple[str, ...]) -> Layout4bit:
    kind, *numbers = words
    return Layout4bit(kind, *map(int, numbers))


class WeightReader4bit(WeightReader):
    """Reads the weight of a ``Linear4bit``."""

    def read(self, module: Any, x: Tensor) -> FrozenWeight | None:
        """Return the weight if the layer computes in x's dtype. Otherwise bitsandbytes casts the input, and casts the output back."""
        weight, state = module.weight, _state(module)
        if state is None or is_sharded(weight):
            return None
        if not torch.compiler.is_compiling():
            weight = weight.data  # of the class Tensor: whatever is asked of a Params4bit runs a Python function first
        if (
            not getattr(state, "packing_format_for_cpu", False)  # rewritten for inference
            and state.shape == (module.out_features, module.in_features)
            and weight.device == x.device
            and module.compute_dtype in (None, x.dtype)  # None before the first input, whose dtype it takes then
            and autocast_dtype(x) in (None, x.dtype)
        ):
            (rows, columns), outer = state.shape, state.state2
            nested = (state.offset, outer.absmax, outer.code) if state.nested else ()
            details = Layout4bit(state.quant_type, state.blocksize, rows, columns, outer.blocksize if nested else 0)
            return FrozenWeight4bit((weight, state.absmax, state.code, *nested), details, state)
        return None


class Linear8bitFormat(QuantizedFormat):
    """Format of ``Linear8bitLt``: one scale per row.

    The first forward pass moves the codes and scales from the weight to the layer's state.
    """

    attributes = ("state", "index", "_apply")
    plain_class = nn.Linear

    def is_quantized(self, module: Any) -> bool:
        """True from the layer's first move to a device. Never with ``has_fp16_weights``, which keeps the weight in 16 bits."""
        return module.weight.dtype == torch.int8

    def input_error(self, module: Any) -> float:
        """LLM.int8 (arXiv:2208.07339) rounds each row of the input to 127 steps either side."""
        return 2.0**-7

    def prepare(self, module: Any, dtype: torch.dtype | None) -> None:
        """Quantize the weight on its current device, and record the dtype to dequantize to."""
        if "_unpacked_dtype" not in module.__dict__:
            module._unpacked_dtype = dtype if module.weight.dtype == torch.int8 else module.weight.dtype
        if not module.state.has_fp16_weights and module.weight.dtype != torch.int8 and module.weight.device.type == "cpu":
            module.weight = module.weight.to("cpu")
        if not module.state.has_fp16_weights:
            move_together(module)

    def dequantize(self, module: Any) -> Tensor:
        """Return the weight in the dtype it was quantized from, fp32 if unknown: bitsandbytes does not record the dtype."""
        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        dense = library_of().functional.int8_vectorwise_dequant(module.weight.data, scales)
        return dense.to(getattr(module, "_unpacked_dtype", None) or torch.float32)

    def requantize(self, module: Any, weight: Tensor) -> None:
        """Quantize row by row, through float16 as bitsandbytes does."""
        library, state = library_of(), module.state
        module.state = library.MatmulLtState()
        for name in ("threshold", "has_fp16_weights", "use_pool"):
            setattr(module.state, name, getattr(state, name))
        codes, scales, _ = library.functional.int8_vectorwise_quant(weight.to(torch.float16).to(module.weight.device))
        module._parameters["weight"] = library.nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)

    def codes(self, module: Any) -> list[Tensor]:
        """Return the 8-bit codes and the scales."""
        return [module.weight.detach().as_subclass(Tensor), module.weight.SCB if module.weight.SCB is not None else module.state.SCB]


def move_together(module: Any) -> None:
    """Let codes and scales of a ``Linear8bitLt`` go where its weight goes.

    A module's move takes only the data of what the weight's own move returns, and bitsandbytes keeps codes and scales beside it: they would
    stay where they were, and the next pass would multiply tensors of two devices.
    """
    if "_apply" not in vars(module):
        module._apply = functools.partial(_apply_to_all, module)


def _apply_to_all(module: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """``nn.Module._apply``; the next pass then takes codes and scales from the weight, as the first one does."""
    type(module)._apply(module, fn, recurse)
    weight = module.weight
    if weight.dtype == torch.int8:  # not while a merged one stands in its place
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        module.state.CB = module.state.SCB = None
        weight.CB, weight.SCB = weight.data, scales.to(weight.device)
    return module


QUANTIZED_FORMATS["bitsandbytes.nn.modules.Linear4bit"] = Linear4bitFormat()
QUANTIZED_FORMATS["bitsandbytes.nn.modules.Linear8bitLt"] = Linear8bitFormat()
WEIGHT_READERS["bitsandbytes.nn.modules.Linear4bit"] = WeightReader4bit()
WEIGHT_LAYOUTS["bitsandbytes-4bit"] = WeightLayout(3, _made4bit)
WEIGHT_LAYOUTS["bitsandbytes-4bit-nested"] = WeightLayout(6, _made4bit)
