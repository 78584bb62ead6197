"""Compute the digest of a parameter's base value. A merge does not change it. A change of any bit of the base does."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.utils.checksums import checksum
from lightning_lora.utils.sharding import local_tensor


def digest(owner: nn.Module, name: str, parameter: Tensor) -> str | None:
    """Return the digest of a full parameter, or of this rank's shard; for a merged weight, the digest of its base.

    None if the parameter is on the meta device, or if the base of a merged weight was not kept.
    """
    if isinstance(owner, LoRALayer) and is_merged(owner, name):
        kept = owner.by_weight()[name].kept_base()
        return kept if kept is None or isinstance(kept, str) else digest(owner, "", kept)
    if isinstance(owner, LoRALayer) and (base := owner.base_beside(name)) is not None:
        parameter = base
    tensor = local_tensor(parameter.detach())
    if tensor.is_meta:
        return None
    if hasattr(tensor, "__tensor_flatten__"):  # a quantized weight that consists of several tensors
        return "+".join(digest(owner, "", getattr(tensor, part)) or "" for part in tensor.__tensor_flatten__()[0])
    return checksum(tensor.as_subclass(Tensor))


class Pass:
    """The digests of one pass over a model, in which nothing changes: a parameter that several modules share is read once.

    Trials of one fit share a base. What a layer adds to its weight is looked at for each layer.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, str | None]] = {}  # by identity, so each is kept alive

    def digest(self, owner: nn.Module, name: str, parameter: Tensor) -> str | None:
        """Return what :func:`digest` returns."""
        if isinstance(owner, LoRALayer) and (is_merged(owner, name) or owner.base_beside(name) is not None):
            return digest(owner, name, parameter)
        if id(parameter) not in self._known:
            self._known[id(parameter)] = parameter, digest(owner, name, parameter)
        return self._known[id(parameter)][1]


def is_merged(owner: nn.Module, name: str) -> bool:
    """Return True if the parameter is a weight that LoRA is merged into."""
    return isinstance(owner, LoRALayer) and owner.merged and name in owner.adapted and owner.by_weight()[name].merged
