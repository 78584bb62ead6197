"""The setting of a training step, as far as its memory depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

DTYPES: Mapping[str, torch.dtype] = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
# Format → bytes an entry, and bytes an output channel. NF4: a scale of 1 byte for 64 entries, and 4 bytes for 256 of those.
QUANTIZED: Mapping[str, tuple[float, float]] = {
    "fp8": (1.0, 4.0),
    "int8": (1.0, 4.0),
    "torchao-int8": (1.0, 4.0),
    "nf4": (0.5 + 1 / 64 + 4 / (64 * 256), 0.0),
    "torchao-nf4": (0.5 + 1 / 64 + 4 / (64 * 256), 0.0),
}
_CHOICES: Mapping[str, tuple[object, ...]] = {
    "strategy": ("single", "ddp", "lora_fsdp2"),
    "precision": tuple(DTYPES),
    "quantize": (None, *QUANTIZED),
    "checkpointing": (None, "full", "selective"),
}


@dataclass(frozen=True)
class Setting:
    """How a model is trained.

    Attributes:
        batch: rows a device.
        length: tokens a row.
        precision: the Trainer's: 32-true, bf16-true, 16-true, bf16-mixed or 16-mixed. Mixed keeps the weights in the model's own dtype.
        quantize: the format of the base's linears, of fp8 and nf4 also of its experts: fp8, nf4, int8, torchao-nf4, torchao-int8; None.
        compiled: ``compile="layer"``.
        recorded: ``cuda_graphs=True``.
        chunked_loss: the loss in chunks of 2048 rows of logits. One whose output layer trains is never chunked.
        checkpointing: "full" (gradient checkpointing), "selective", or None.
        offload: any of "activations" (with checkpointing) and "frozen".
        strategy: single, ddp or lora_fsdp2.
        devices: how many.

    Raises:
        ValueError: a value is wrong; the message names it.

    Examples:
        >>> Setting(batch=4, length=2048, quantize="nf4", checkpointing="selective").precision
        'bf16-true'
    """

    batch: int = 8
    length: int = 1024
    precision: str = "bf16-true"
    quantize: str | None = None
    compiled: bool = False
    recorded: bool = False
    chunked_loss: bool = True
    checkpointing: str | None = None
    offload: tuple[str, ...] = ()
    strategy: str = "single"
    devices: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "length", "devices"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive whole number")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known to estimate; it is one of {', '.join(map(str, choices))}")
        unknown = [name for name in self.offload if name not in ("activations", "frozen")]
        if unknown:
            raise ValueError(f"offload={unknown[0]!r} is not known; it is 'activations' or 'frozen'")
        if "activations" in self.offload and self.checkpointing is None:
            raise ValueError("offload='activations' needs checkpointing='full' or 'selective': without it everything would be moved")
        if "frozen" in self.offload and self.strategy == "lora_fsdp2":
            raise ValueError("offload='frozen' does not go with strategy='lora_fsdp2', which shards the frozen weights")
        if self.recorded and not self.compiled:
            raise ValueError("cuda_graphs=True (recorded) needs compile (compiled): CUDA graphs are recorded of compiled blocks")
        if self.devices > 1 and self.strategy == "single":
            raise ValueError(f"devices={self.devices} needs strategy='ddp' or 'lora_fsdp2'")
