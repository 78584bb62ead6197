"""transformers' ``FP8Experts`` (DeepSeek-V3, Qwen3-FP8): stacks of e4m3 matrices with one scale per block of, say, 128 x 128 entries.

As :mod:`~lightning_lora.quantization.block_float8` does with linears, preparing such a module turns it into one that multiplies by the
dequantized weights, on any device and with a gradient, in place. Its state dict keeps names and dtypes. Unloading the adapters gives the
``FP8Experts`` back, except on a sharded model. Inputs are not quantized, whatever the activation scheme says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.ops import float8
from lightning_lora.ops.frozen_stack import FrozenStack
from lightning_lora.ops.frozen_weight import WEIGHT_LAYOUTS, WeightLayout
from lightning_lora.quantization.block_float8 import Block, expanded, quantize_blocks
from lightning_lora.quantization.formats import PACKED_STACKS, QUANTIZED_FORMATS, QuantizedFormat
from lightning_lora.quantization.stacks import Alone, Packed, PackedStacks, PackedStacksFormat, StackFormat, become_packed, packed_class
from lightning_lora.registry import qualified_name
from lightning_lora.utils.parameters import make_parameter
from lightning_lora.utils.sharding import is_sharded
from lightning_lora.utils.transformers_experts import PRODUCTS_ALONE, dequantized_forward, experts_implementation

_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
_SCALE = "scale_inv"
_TOGETHER = 2**26  # entries that are fp32 at once while they are dequantized


class BlockFloat8Stack(FrozenStack):
    """Codes (..., m, n) as bytes, and scales (..., m/b₀, n/b₁), both rounded up, in fp32."""

    name = "block-float8-stack"
    block: Block

    @property
    def leading(self) -> torch.Size:
        """The leading dimensions."""
        return self.tensors[0].shape[:-2]

    @property
    def layout(self) -> str:  # type: ignore[override]
        """Return the layout's name, the size of a matrix, 1 if it is transposed, and the block."""
        return f"{super().layout} {self.block[0]} {self.block[1]}"

    @classmethod
    def made(cls, tensors: Sequence[Tensor], words: Sequence[str]) -> BlockFloat8Stack:
        """Build a stack from its tensors and the words after its layout's name."""
        *rest, high, wide = words
        made = super().made(tensors, rest)
        made.block = (int(high), int(wide))
        return made

    def _with(self, tensors: Sequence[Tensor], flipped: bool) -> BlockFloat8Stack:
        new = super()._with(tensors, flipped)
        new.block = self.block
        return new

    def stored(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized matrices: multiplied in fp32, rounded once."""
        codes, scales = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in self.tensors)
        step = max(1, _TOGETHER // max(1, codes.shape[-2] * codes.shape[-1]))
        dense = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for some, scale, into in zip(codes.split(step), scales.split(step), dense.split(step), strict=True):
            into.copy_(some.view(float8.E4M3).float().mul_(expanded(scale, self.block, some.shape)))
        return dense.view(self.tensors[0].shape)


class _Unused:
    """In place of scales, which the loop over experts passes on, to do nothing with them beside a dequantized weight."""

    def __getitem__(self, index: Any) -> None:
        return None


@dataclass(frozen=True)
class BlockStackFormat(StackFormat):
    """Of one weight.

    Attributes:
        block: entries of a matrix that share a scale.
    """

    block: Block
    name = "FP8 in blocks"
    beside = (_SCALE,)

    def pack(self, weight: Tensor, transposed: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize with blocks of the same size."""
        packed = [quantize_blocks(matrix.float(), self.block) for matrix in weight.unbind(0)]
        return torch.stack([codes for codes, _ in packed]), {_SCALE: torch.stack([scales for _, scales in packed])}

    def stack(self, codes: Tensor, packed: Packed) -> FrozenStack:
        """Return the weight as products take it."""
        rows, columns = packed.shape[-2:]
        made = BlockFloat8Stack((codes, packed.tensors[_SCALE]), (rows, columns), packed.dtype)
        made.block = self.block
        return made


class PackedFP8Experts(PackedStacks):
    """What an ``FP8Experts`` becomes under adapters.

    Attributes:
        came_with: its scales as they came, by name.
    """

    came_with: dict[str, nn.Parameter]

    @classmethod
    def computed_as(cls, plain: type[nn.Module]) -> type[nn.Module]:
        """Return a class that runs transformers' functions for plain weights."""

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            _check_implementation(self)
            run = dequantized_forward(self)
            if run is not None:
                return run(self, *args, **kwargs)
            self.__dict__.update(dict.fromkeys(self.came_with, _Unused()))
            return plain.forward(self, *args, **kwargs)

        return type(f"Dequantized{plain.__name__}", (plain,), {"__module__": plain.__module__, "forward": forward})

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.packed_stacks:
            if not is_sharded(self._parameters[name]):  # type: ignore[arg-type]
                destination[prefix + name] = self._parameters[name].detach().view(float8.E4M3)  # type: ignore[union-attr]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        codes = {prefix + name: state_dict.get(prefix + name) for name in self.packed_stacks}
        found = {key: code.view(torch.uint8) for key, code in codes.items() if isinstance(code, Tensor) and code.dtype == float8.E4M3}
        super()._load_from_state_dict({**state_dict, **found}, prefix, *args)


class PackedFP8ExpertsFormat(PackedStacksFormat):
    """Format of a :class:`PackedFP8Experts`."""

    attributes = (PACKED_STACKS, "came_with")

    def restore(self, module: Any) -> None:
        """Turn a module back into the ``FP8Experts`` that it was, with the codes and scales that it has now.

        A sharded one stays, and one with plain weights, which an ``FP8Experts`` does not multiply by.
        """
        if not module.packed_stacks or any(is_sharded(parameter) for parameter in module._parameters.values() if parameter is not None):
            return
        stacks, came = module.packed_stacks, module.came_with
        for name, packed in stacks.items():
            codes, scales = module._parameters[name].detach(), packed.tensors[_SCALE]
            module._parameters[name] = make_parameter(codes.view(float8.E4M3), False)
            old = came[f"{name}_{_SCALE}"].detach().to(codes.device)
            same = codes.is_meta or torch.equal(old.float(), scales.to(codes.device))  # not after a merge that stays
            module._parameters[f"{name}_{_SCALE}"] = make_parameter(old if same else scales.to(codes.device), False)
        for name in self.attributes:
            del module.__dict__[name]
        module.__class__ = self.unpacked_class(module)


class FP8ExpertsFormat(QuantizedFormat):
    """Format of transformers' ``FP8Experts``: it is turned into a :class:`PackedFP8Experts` before adapters come."""

    attributes = tuple(f"{name}_{_SCALE}" for name in _WEIGHTS)
    shards = True

    def packed(self, module: Any) -> tuple[str, ...]:
        """Return the names of its weights."""
        there = {name: module._parameters.get(name) for name in _WEIGHTS}
        return tuple(name for name, weight in there.items() if weight is not None and weight.element_size() == 1)

    def is_quantized(self, module: Any) -> bool:
        """False where the weights were dequantized on loading."""
        return bool(self.packed(module))

    def shape(self, module: Any, name: str) -> torch.Size:
        """Return the shape of the codes; two of FP4 are in a byte."""
        weight = module._parameters[name]
        return torch.Size((*weight.shape[:2], 2 * weight.shape[2])) if weight.dtype == torch.int8 else weight.shape

    def single(self, module: Any, name: str) -> Any:
        """Return a layer with that weight alone."""
        return Alone(make_parameter(module._parameters[name].detach().view(torch.uint8), False), self._packed(module, name, torch.bfloat16))

    def refusal(self, module: Any) -> str | None:
        """Return a reason for weights of 4 bits, ones that are split already, or an implementation with kernels of its own."""
        weights = {name: module._parameters[name] for name in self.packed(module)}
        if any(weight.dtype == torch.int8 for weight in weights.values()):
            return (
                "its weights are packed as FP4, a format that is not known here: load the model with"
                " quantization_config=FineGrainedFP8Config(dequantize=True), and quantize it with 'fp8' or 'nf4' if it is to stay small"
            )
        if any(is_sharded(weight) for weight in weights.values()):
            return "its FP8 weights are sharded already: apply LoRA before the model is parallelized"
        try:
            for name in weights:
                self._packed(module, name, torch.bfloat16)
            _check_implementation(module)
        except ValueError as error:
            return str(error)
        return None

    def prepare(self, module: Any, dtype: torch.dtype | None) -> None:
        """Turn the module into a :class:`PackedFP8Experts`."""
        names = self.packed(module)
        if not names:
            return
        packed = {name: self._packed(module, name, dtype or torch.bfloat16) for name in names}
        codes = {name: make_parameter(module._parameters[name].detach().view(torch.uint8), False) for name in names}
        module.came_with = {f"{name}_{_SCALE}": module._parameters.pop(f"{name}_{_SCALE}") for name in names}
        become_packed(module, codes, packed, packed_class(type(module), PackedFP8Experts))

    def _packed(self, module: Any, name: str, dtype: torch.dtype) -> Packed:
        """Return what is beside the codes.

        Raises:
            ValueError: the scales are of no blocks. The message is only the reason.
        """
        weight, stored = module._parameters[name], module._parameters[f"{name}_{_SCALE}"].detach()
        scales = stored.float()
        given = module.block_size or (None, None)
        block = tuple(_side(*sides) for sides in zip(weight.shape[1:], scales.shape[1:], given, strict=True))
        if None in block or not stored.is_floating_point():
            raise ValueError(
                f"{name} {tuple(weight.shape)} has scales {tuple(scales.shape)} in {stored.dtype}, not a number for each {given}: load the"
                " model with quantization_config=FineGrainedFP8Config(dequantize=True)"
            )
        return Packed(BlockStackFormat(block), {_SCALE: scales}, weight.shape, dtype)  # type: ignore[arg-type]


def _side(entries: int, scales: int, given: int | None) -> int | None:
    """Return how many entries share a scale; None if that is not a whole number.

    Where gate and up together are narrower than a block, each has scales of its own all the same.
    """
    if given is not None and -(-entries // given) == scales:
        return given
    return None if entries % scales else entries // scales


def _check_implementation(module: nn.Module) -> None:
    chosen = experts_implementation(module)
    if chosen not in PRODUCTS_ALONE:
        raise ValueError(
            f"experts_implementation={chosen!r} has kernels of its own for FP8, without a gradient or for GPUs only: call"
            " model.set_experts_implementation('grouped_mm'), 'batched_mm' or 'eager'"
        )


QUANTIZED_FORMATS["transformers.integrations.finegrained_fp8.FP8Experts"] = FP8ExpertsFormat()
QUANTIZED_FORMATS[qualified_name(PackedFP8Experts)] = PackedFP8ExpertsFormat()
WEIGHT_LAYOUTS[BlockFloat8Stack.name] = WeightLayout(2, BlockFloat8Stack.made)
