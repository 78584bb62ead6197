"""Experts that libraries pack for inference: refused by name, with the way to load the model so that it can be trained.

Their kernels have no backward pass. So every layer before them would silently get no gradient, whether they are adapted or not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_lora.quantization.formats import QUANTIZED_FORMATS, QuantizedFormat

_SMALL = "and quantize it with 'fp8' or 'nf4' if it is to stay small"


class InferenceOnly(QuantizedFormat):
    """Format of modules that cannot be trained on.

    Args:
        reason: why, and how to load the model instead.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def packed(self, module: Any) -> tuple[str, ...]:
        """Return none: what its tensors hold is not known."""
        return ()

    def refusal(self, module: Any) -> str | None:
        """Return the reason."""
        return self.reason

    def dequantize(self, module: Any) -> Tensor:
        """Refuse.

        Raises:
            ValueError: always. The message is only the reason.
        """
        raise ValueError(self.reason)

    def codes(self, module: Any) -> list[Tensor]:
        """Return the module's tensors."""
        return [parameter.detach() for parameter in module._parameters.values() if parameter is not None]


QUANTIZED_FORMATS["transformers.integrations.mxfp4.Mxfp4GptOssExperts"] = InferenceOnly(
    "its experts are packed as MXFP4, whose kernels pass no gradient on: load the model with"
    f" quantization_config=Mxfp4Config(dequantize=True), {_SMALL}"
)
QUANTIZED_FORMATS["transformers.integrations.fbgemm_fp8.FbgemmFp8Llama4TextExperts"] = InferenceOnly(
    "its experts are packed for fbgemm's kernels, which pass no gradient on: load the checkpoint in 16 bits, without this"
    f" quantization_config, {_SMALL}"
)
