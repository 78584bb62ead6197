"""FP8: ``Float8Linear``, an ``nn.Linear`` whose weight is stored as e4m3 with a scale per output channel. ``quantize="fp8"`` makes it.

This file is about how the weight is stored, on any device. How it multiplies is in :mod:`lightning_lora.ops.float8_weight`.

The weight holds the codes as bytes, so that nothing takes them for numbers: ``model.to(torch.bfloat16)``, a precision plugin and FSDP2's
mixed precision leave them alone, and every collective moves them. The scales are an attribute, as they are of bitsandbytes' layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.ops import backends, float8
from lightning_lora.ops.float8_weight import Float8Weight
from lightning_lora.ops.frozen_linear import frozen_linear
from lightning_lora.ops.frozen_weight import WEIGHT_READERS, FrozenWeight, WeightReader
from lightning_lora.quantization.formats import QUANTIZED_FORMATS, QuantizedFormat
from lightning_lora.quantization.quantizers import QUANTIZERS, Quantizer
from lightning_lora.registry import qualified_name
from lightning_lora.utils.parameters import make_parameter
from lightning_lora.utils.sharding import full_tensor, is_sharded, local_shard, local_tensor


class Float8Linear(nn.Linear):
    """A frozen linear with an FP8 weight. Made by ``quantize_base(model, "fp8")`` of an ``nn.Linear``, in place.

    Attributes:
        weight: (out, in), e4m3 codes as bytes.
        weight_scale: (out,), fp32, powers of two. :meth:`scales` has them on the weight's device.
        plain_dtype: the dtype of the weight that was quantized. ``.to(dtype)`` changes it, as it changes a plain weight's.
    """

    #: The name of the scales, as an attribute and in a state dict.
    scale_name: ClassVar[str] = "weight_scale"
    weight_scale: Tensor
    plain_dtype: torch.dtype

    def packed_weight(self) -> FrozenWeight:
        """Return the weight as products take it."""
        return Float8Weight(self.weight, self.scales())

    def scales(self) -> Tensor:
        """Return the scales on the weight's device. They stay behind where FSDP2 moves a model, its parameters and buffers."""
        scale: Tensor = getattr(self, self.scale_name)
        if scale.device != self.weight.device:
            scale = scale.to(self.weight.device)
            setattr(self, self.scale_name, scale)
        return scale

    def forward(self, input: Tensor) -> Tensor:
        """Return ``x·Wᵀ + b`` in the input's dtype, or in autocast's."""
        y = frozen_linear(input, self.packed_weight(), self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float8Linear:
        super()._apply(fn, recurse)
        old: Tensor = getattr(self, self.scale_name)
        like = fn(torch.empty(0, dtype=self.plain_dtype, device=old.device))
        if like.device != old.device:
            setattr(self, self.scale_name, torch.empty_like(old, device=like.device) if old.is_meta else old.to(like.device))
        elif fn(old).dtype == old.dtype:
            setattr(self, self.scale_name, fn(old))  # share_memory_() and the like; never rounded
        self.plain_dtype = like.dtype
        backends.look_at(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + self.scale_name] = getattr(self, self.scale_name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, strict, missing, unexpected, errors = args
        key, old = prefix + self.scale_name, getattr(self, self.scale_name)
        weight, scale = state_dict.get(prefix + "weight"), state_dict.get(key)
        if isinstance(weight, Tensor) and weight.is_floating_point() and scale is None:
            errors.append(
                f"{prefix}weight: a weight in {weight.dtype} for a layer that is quantized to FP8; load it first, then quantize the model"
            )
            return
        super()._load_from_state_dict({name: value for name, value in state_dict.items() if name != key}, prefix, *args)
        if scale is not None and key in unexpected:
            unexpected.remove(key)
        if isinstance(scale, Tensor) and scale.shape == old.shape:
            setattr(self, self.scale_name, scale.detach().to(old.device, torch.float32, copy=True))
        elif scale is not None:
            errors.append(f"{key}: shape {tuple(scale.shape)} is not {tuple(old.shape)}")
        elif strict and weight is not None:
            missing.append(key)


class Float8Format(QuantizedFormat):
    """Format of :class:`Float8Linear`."""

    shards = True
    attributes = ("weight_scale", "plain_dtype")
    plain_class = nn.Linear

    def input_error(self, module: Any) -> float:
        """Where products are in FP8, inputs are e4m3: each is rounded by 2⁻⁴ at most, a sum of products by about half of it."""
        there = torch.empty(0, dtype=module.plain_dtype, device=module.weight.device)
        return 2.0**-5 if float8.is_emulating() or backends.multiplies_float8(there) else 0.0

    def dequantize(self, module: Any) -> Tensor:
        """Return the weight in the dtype it was quantized from."""
        return float8.dequantize(full_tensor(module.weight.detach()), module.scales(), module.plain_dtype)

    def requantize(self, module: Any, weight: Tensor) -> None:
        """Quantize with a new scale per output channel."""
        _store(module, weight.to(module.weight.device))

    def codes(self, module: Any) -> list[Tensor]:
        """Return the codes and the scales."""
        return [full_tensor(module.weight.detach()).as_subclass(Tensor), module.scales()]

    def unpacked_dtype(self, module: Any) -> torch.dtype:
        """Return the dtype that the weight dequantizes to."""
        dtype: torch.dtype = module.plain_dtype
        return dtype

    def take_over(self, module: Any, other: Any) -> None:
        """Take the codes, or this rank's rows of them, and all scales."""
        if is_sharded(module.weight):
            local_tensor(module.weight).copy_(local_shard(other.weight.detach(), module.weight))
        else:
            module._parameters["weight"] = other.weight
        setattr(module, module.scale_name, other.weight_scale)


class Float8Reader(WeightReader):
    """Reads the weight of a :class:`Float8Linear`."""

    def read(self, module: Any, x: Tensor) -> FrozenWeight | None:
        """Return the weight, for x of any dtype, since it has none of its own."""
        return None if is_sharded(module.weight) or module.weight.device != x.device else module.packed_weight()


def quantize_float8(linear: nn.Linear, device: torch.device) -> None:
    """Turn a linear into a :class:`Float8Linear`, in place."""
    home, dtype = linear.weight.device, linear.weight.dtype
    _store(linear, linear.weight.detach().to(device))
    linear.weight_scale = linear.weight_scale.to(home)
    linear._parameters["weight"] = make_parameter(linear.weight.detach().to(home), False)
    linear.plain_dtype = dtype  # type: ignore[assignment]
    linear.__class__ = Float8Linear
    backends.look_at(home)


def _store(module: Any, weight: Tensor) -> None:
    codes, scale = float8.quantize_rows([weight], [None])
    module.weight_scale = scale
    module._parameters["weight"] = make_parameter(codes.view(torch.uint8), False)


_NAME = qualified_name(Float8Linear)
QUANTIZED_FORMATS[_NAME] = Float8Format()
WEIGHT_READERS[_NAME] = Float8Reader()
QUANTIZERS["fp8"] = Quantizer(quantize_float8, lambda: None, "Float8", on_meta=True)
