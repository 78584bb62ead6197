"""transformers' ``FP8Linear`` (DeepSeek-V3, Qwen3-FP8): e4m3 weights with one scale per block of, say, 128 x 128 entries.

Its forward multiplies through kernels that are fetched when first called, for GPUs only. Preparing such a layer turns it into a
``BlockFloat8Linear``, in place, which multiplies by the dequantized weight, on any device and with a gradient. Entries of a state dict keep
their names and dtypes, so the model's own ``save_pretrained`` writes what it wrote before. Unloading the adapters gives the ``FP8Linear``
back, except on a sharded model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.ops import backends, float8
from lightning_lora.ops.frozen_weight import WEIGHT_LAYOUTS, FrozenWeight, WeightLayout
from lightning_lora.quantization.float8 import Float8Linear
from lightning_lora.quantization.formats import QUANTIZED_FORMATS, QuantizedFormat
from lightning_lora.registry import qualified_name
from lightning_lora.utils.parameters import make_parameter
from lightning_lora.utils.sharding import full_tensor, is_sharded

Block = tuple[int, int]
_LARGEST = 448  # of e4m3


class BlockFloat8Weight(FrozenWeight):
    """A weight of e4m3 codes (out, in) as bytes, and scales (out/b₀, in/b₁), both rounded up."""

    def __init__(self, codes: Tensor, scales: Tensor, block: Block) -> None:
        self.tensors, self.block = (codes, scales), block

    @property
    def layout(self) -> str:  # type: ignore[override]
        """Return the block's size."""
        return f"block-float8 {self.block[0]} {self.block[1]}"

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight, a new tensor: multiplied in fp32, rounded once."""
        codes, scales = self.tensors
        return (codes.view(float8.E4M3).float() * expanded(scales, self.block, codes.shape)).to(dtype)


def expanded(scales: Tensor, block: Block, shape: Sequence[int]) -> Tensor:
    """Return each entry's scale, for matrices (..., m, n) with scales (..., m/b₀, n/b₁)."""
    return scales.repeat_interleave(block[0], -2)[..., : shape[-2], :].repeat_interleave(block[1], -1)[..., : shape[-1]]


def quantize_blocks(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Return the codes (m, n), as bytes, and the scales of a matrix in fp32, each block by its largest entry."""
    (out, width), (high, wide) = weight.shape, block
    padded = nn.functional.pad(weight, (0, -width % wide, 0, -out % high))
    largest = padded.view(padded.shape[0] // high, high, padded.shape[1] // wide, wide).abs().amax((1, 3))
    scales = (largest / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / expanded(scales, block, weight.shape)).to(float8.E4M3).view(torch.uint8), scales


@dataclass(frozen=True)
class CameAs:
    """What an ``FP8Linear`` had before it was turned into a :class:`BlockFloat8Linear`: its class, parameters and attributes."""

    cls: type[nn.Module]
    parameters: dict[str, nn.Parameter | None]
    attributes: dict[str, Any]


class BlockFloat8Linear(Float8Linear):
    """What an ``FP8Linear`` becomes under adapters.

    Attributes:
        weight: (out, in), e4m3 codes as bytes; in a state dict as e4m3.
        weight_scale_inv: (out/b₀, in/b₁), fp32: what the codes are multiplied by, despite its name.
        block: (b₀, b₁).
        plain_dtype: the dtype to dequantize to.
        came_as: what the layer was.
    """

    scale_name = "weight_scale_inv"
    block: Block
    came_as: CameAs

    def packed_weight(self) -> FrozenWeight:
        """Return the weight as products take it."""
        return BlockFloat8Weight(self.weight, self.scales(), self.block)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not is_sharded(self.weight):
            destination[prefix + "weight"] = self.weight.detach().view(float8.E4M3)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if isinstance(weight, Tensor) and weight.dtype == float8.E4M3:
            state_dict = {**state_dict, prefix + "weight": weight.view(torch.uint8)}
        super()._load_from_state_dict(state_dict, prefix, *args)


class BlockFloat8Format(QuantizedFormat):
    """Format of :class:`BlockFloat8Linear`."""

    shards = True
    attributes = ("weight_scale_inv", "plain_dtype", "block", "came_as")
    plain_class = nn.Linear

    def restore(self, module: Any) -> None:
        """Turn a layer back into the ``FP8Linear`` that it was, with the codes and scales that it has now. A sharded one stays."""
        if is_sharded(module.weight):
            return
        came, codes, scales = module.came_as, module.weight.detach().view(float8.E4M3), module.scales()
        for name in self.attributes:
            del module.__dict__[name]
        module.__class__ = came.cls
        module.__dict__.update(came.attributes)
        module._parameters["weight"] = make_parameter(codes, False)
        for name, parameter in came.parameters.items():
            module._parameters[name] = None if parameter is None else make_parameter(parameter.detach().to(codes.device), False)
        if not codes.is_meta and not torch.equal(_of_transformers(module).tensors[1], scales):  # after a merge that stays
            module._parameters["weight_scale_inv"] = make_parameter(scales.reshape(module.weight_scale_inv.shape), False)

    def dequantize(self, module: Any) -> Tensor:
        """Return the weight in the surrounding model's dtype."""
        weight = BlockFloat8Weight(full_tensor(module.weight.detach()), module.scales(), module.block)
        return weight.dense(module.plain_dtype)

    def requantize(self, module: Any, weight: Tensor) -> None:
        """Quantize with blocks of the same size, each by its largest entry."""
        codes, module.weight_scale_inv = quantize_blocks(weight.to(module.weight.device, torch.float32), module.block)
        module._parameters["weight"] = make_parameter(codes, False)

    def codes(self, module: Any) -> list[Tensor]:
        """Return the codes and the scales."""
        return [full_tensor(module.weight.detach()).as_subclass(Tensor), module.scales()]


class FP8LinearFormat(QuantizedFormat):
    """Format of transformers' ``FP8Linear``: it is turned into a :class:`BlockFloat8Linear` before it gets an adapter."""

    attributes = ("weight_scale_inv", "activation_scale", "block_size", "activation_scheme", "has_bias")
    plain_class = nn.Linear

    def is_quantized(self, module: Any) -> bool:
        """False where the weight was dequantized on loading."""
        return module.weight.element_size() == 1

    def refusal(self, module: Any) -> str | None:
        """Return a reason for a weight of 4 bits, or one that is split into pieces already."""
        if module.weight.dtype == torch.int8:
            return "its weight is packed as FP4, a format that is not known here: load the model dequantized"
        if is_sharded(module.weight):
            return "its FP8 weight is sharded already: apply LoRA before the model is parallelized"
        return None

    def prepare(self, module: Any, dtype: torch.dtype | None) -> None:
        """Turn the layer into a :class:`BlockFloat8Linear`."""
        if not self.is_quantized(module):
            return
        weight = _of_transformers(module)
        # The scales of a static scheme are among them, by which x is quantized; here it is not.
        parameters = {name: module._parameters.pop(name) for name in self.attributes if name in module._parameters}
        attributes = {name: module.__dict__.pop(name) for name in self.attributes if name in module.__dict__}
        module.came_as = CameAs(type(module), parameters, attributes)
        (codes, module.weight_scale_inv), module.block = weight.tensors, weight.block
        module.plain_dtype = dtype or torch.bfloat16
        module._parameters["weight"] = make_parameter(codes.view(torch.uint8), False)
        module.__class__ = BlockFloat8Linear
        backends.look_at(module.weight.device)

    def dequantize(self, module: Any) -> Tensor:
        """Return the weight in bf16.

        Raises:
            ValueError: it is packed in another format. The message is only the reason.
        """
        reason = self.refusal(module)
        if reason:
            raise ValueError(reason)
        return _of_transformers(module).dense(torch.bfloat16)

    def codes(self, module: Any) -> list[Tensor]:
        """Return the codes and the scales."""
        codes, scales = _of_transformers(module).tensors
        return [codes.view(torch.uint8), scales]


def _of_transformers(module: Any) -> BlockFloat8Weight:
    """Return the weight of an ``FP8Linear``. Without a block size it has one scale."""
    scales, shape = module.weight_scale_inv.detach().float(), module.weight.shape
    high, wide = module.block_size or shape
    return BlockFloat8Weight(module.weight.detach(), scales.reshape(1, 1) if scales.dim() == 0 else scales, (high, wide))


def _read(tensors: Sequence[Tensor], details: Sequence[str]) -> BlockFloat8Weight:
    codes, scales = tensors
    high, wide = map(int, details)
    return BlockFloat8Weight(codes, scales, (high, wide))


QUANTIZED_FORMATS["transformers.integrations.finegrained_fp8.FP8Linear"] = FP8LinearFormat()
QUANTIZED_FORMATS[qualified_name(BlockFloat8Linear)] = BlockFloat8Format()
WEIGHT_LAYOUTS["block-float8"] = WeightLayout(2, _read)
