"""torchao: a plain ``nn.Linear`` whose weight is a tensor subclass, ``NF4Tensor`` (QLoRA, arXiv:2305.14314) or ``Int8Tensor``.

Adapters can train on any other of torchao's weights that quantizes no inputs, and merge into it by dequantizing.

Classes are registered by their qualified names, at the end of this file, so that torchao is imported only where it is used. ``NF4Tensor``
has moved between releases. In another place it is treated as any other of torchao's weights, and ``quantize="torchao-nf4"`` raises.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.quantization.formats import QUANTIZED_FORMATS, QuantizedFormat
from lightning_lora.quantization.quantizers import QUANTIZERS, Quantizer
from lightning_lora.utils.sharding import local_tensor


def _library() -> ModuleType:
    try:
        import torchao.quantization
    except ImportError as error:
        raise ImportError("this quantization needs the package torchao; pip install 'lightning-lora[torchao]'") from error
    return torchao.quantization


class SubclassFormat(QuantizedFormat):
    """A tensor subclass that can dequantize itself and list its inner tensors."""

    requantizes = False

    def refusal(self, module: Any) -> str | None:
        """Return a reason for a weight that quantizes its inputs too: int8 ones then drop the gradient silently, float8 ones have none."""
        weight = local_tensor(module.weight)
        if getattr(weight, "act_quant_kwargs", None) is None:
            return None
        return (
            f"its {type(weight).__name__} quantizes inputs too, through which torchao passes no gradient: quantize the weights only "
            "(Int8WeightOnlyConfig, Float8WeightOnlyConfig), or with quantize_base(model, 'fp8')"
        )

    def prepare(self, module: Any, dtype: torch.dtype | None) -> None:
        """Remove the ``extra_repr`` that ``quantize_`` sets on the instance. It would hide the adapter and cannot be pickled."""
        module.__dict__.pop("extra_repr", None)

    def dequantize(self, module: Any) -> Tensor:
        """Return the weight in the dtype that it reports."""
        return module.weight.detach().dequantize()

    def codes(self, module: Any) -> list[Tensor]:
        """Return the weight's inner tensors; under sharding those of this rank's local shard."""
        weight: Any = local_tensor(module.weight.detach())
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


class Int8Format(SubclassFormat):
    """Format of ``Int8Tensor``: one scale per row."""

    requantizes = True

    def requantize(self, module: Any, weight: Tensor) -> None:
        """Quantize with one scale per row, or one for the whole weight if the old weight has one."""
        old, ao = module.weight.detach(), _library()
        granularity = ao.granularity.PerRow() if old.block_size[0] == 1 else ao.granularity.PerTensor()
        new = ao.Int8Tensor.from_hp(weight.to(old.device, old.dtype).contiguous(), granularity)
        module._parameters["weight"] = nn.Parameter(new, requires_grad=False)


class NF4Format(SubclassFormat):
    """Format of ``NF4Tensor``: blocks of 64 values share a scale, and the scales are 8-bit themselves."""

    requantizes = shards = True

    def dequantize(self, module: Any) -> Tensor:
        """Return the weight in the dtype it was quantized from."""
        return module.weight.detach().get_original_weight()

    def requantize(self, module: Any, weight: Tensor) -> None:
        """Quantize with the same block sizes."""
        old = module.weight.detach()
        new = type(old).from_tensor(weight.to(old.device, old.dtype).contiguous(), old.block_size, old.scaler_block_size)
        module._parameters["weight"] = nn.Parameter(new, requires_grad=False)


def quantize_nf4(linear: nn.Linear, device: torch.device) -> None:
    """Quantize to 4-bit NormalFloat with double quantization.

    Raises:
        ImportError: this version of torchao does not have ``NF4Tensor`` in the known place.
    """
    try:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
    except ImportError as error:
        version = getattr(sys.modules.get("torchao"), "__version__", "")
        raise ImportError(
            f"torchao {version} keeps NF4Tensor elsewhere or has none: install torchao 0.18, or use quantize='nf4'."
        ) from error

    packed = to_nf4(linear.weight.detach().to(device).contiguous())
    linear.weight = nn.Parameter(packed.to(linear.weight.device), requires_grad=False)


def quantize_int8(linear: nn.Linear, device: torch.device) -> None:
    """Quantize the weight to 8 bits with one scale per row. Inputs are not quantized."""
    ao = _library()
    packed = ao.Int8Tensor.from_hp(linear.weight.detach().to(device).contiguous(), ao.granularity.PerRow())
    linear.weight = nn.Parameter(packed.to(linear.weight.device), requires_grad=False)


QUANTIZED_FORMATS["torchao.utils.TorchAOBaseTensor"] = SubclassFormat()
QUANTIZED_FORMATS["torchao.quantization.Int8Tensor"] = Int8Format()
QUANTIZED_FORMATS["torchao.quantization.quantize_.workflows.nf4.nf4_tensor.NF4Tensor"] = NF4Format()
# 64 entries per block and 256 scales per block of scales. torchao supports other sizes, but a copy of the weight returns to these.
QUANTIZERS["torchao-nf4"] = Quantizer(quantize_nf4, _library, "NF4", unit=64 * 256)
QUANTIZERS["torchao-int8"] = Quantizer(quantize_int8, _library, "Int8", float64=False)
