"""Digest of a parameter as a base tensor: the same however it is merged, for as long as no bit of the base changes."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.utils.checksums import checksum
from lightning_lora.utils.sharding import local_tensor


def digest(owner: nn.Module, name: str, parameter: Tensor) -> str | None:
    """Of all of a parameter, or of this rank's piece; of a merged weight that of the base's. None: it has none, or cannot be known."""
    if isinstance(owner, LoRALayer) and is_merged(owner, name):
        kept = owner.by_weight()[name].kept_base()
        return kept if kept is None or isinstance(kept, str) else digest(owner, "", kept)
    tensor = local_tensor(parameter.detach())
    if tensor.is_meta:
        return None
    if hasattr(tensor, "__tensor_flatten__"):  # a packed weight that is made of others
        return "+".join(digest(owner, "", getattr(tensor, part)) or "" for part in tensor.__tensor_flatten__()[0])
    return checksum(tensor.as_subclass(Tensor))


def is_merged(owner: nn.Module, name: str) -> bool:
    """Whether a parameter is a weight into which LoRA is merged."""
    return isinstance(owner, LoRALayer) and owner.merged and name in owner.adapted and owner.by_weight()[name].merged
