"""compressed-tensors (vLLM's checkpoints, FP8 and others): refused by name, with the way to load the model so that it can be trained.

transformers leaves the layers plain ``nn.Linear``, sets a forward of that library on each, and unpacks the weights at the first call. That
forward quantizes inputs without a gradient, so every layer before it would silently get none, adapted or not. The kernels that
transformers has instead on GPUs are for inference too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_lora.quantization.formats import QUANTIZED_FORMATS, QuantizedFormat

_REASON = (
    "it is compressed by compressed-tensors, whose forward passes no gradient on: load the model with "
    "quantization_config=CompressedTensorsConfig(dequantize=True), and quantize it with 'fp8' if it is to stay small"
)


class CompressedFormat(QuantizedFormat):
    """Format of a layer that compressed-tensors computes, before and after its weight was unpacked."""

    def is_quantized(self, module: Any) -> bool:
        """True for linears; an embedding's weight is not read here."""
        return isinstance(module, nn.Linear)

    def refusal(self, module: Any) -> str | None:
        """Return the reason."""
        return _REASON

    def dequantize(self, module: Any) -> Tensor:
        """Refuse.

        Raises:
            ValueError: always. The message is only the reason.
        """
        raise ValueError(_REASON)

    def codes(self, module: Any) -> list[Tensor]:
        """Return the layer's tensors."""
        return [parameter.detach() for parameter in module._parameters.values() if parameter is not None]


QUANTIZED_FORMATS["compressed_tensors.quantization.quant_scheme.QuantizationScheme"] = CompressedFormat()
QUANTIZED_FORMATS["transformers.integrations.compressed_tensors.CompressedTensorsFP8Linear"] = CompressedFormat()
