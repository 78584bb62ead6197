"""Merging a layer's update into its weight and back, and what a merged layer's state dict is.

A merged layer is a plain layer to the outside: its state dict has the base's keys only, since a file that carried the
adapter too would apply it twice. When an adapter is loaded into it, it unmerges first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_lora.layers import merging
from lightning_lora.quantization import formats
from lightning_lora.utils.checksums import checksum
from lightning_lora.utils.sharding import full_tensor, is_sharded, local_shard, local_tensor

PREFIX = "lora_"  # of every parameter that LoRA adds to a layer
Quantized = Literal["dequantize", "requantize"]  # how to merge into a quantized weight

T = TypeVar("T")


class Mergeable(nn.Module):
    """A layer with a ``weight``, adapter parameters named ``lora_*`` and a dense update :meth:`lora_delta`."""

    #: Whether a state dict with the base alone may come, at a time when modules load their base (Lightning's ``setup``).
    lora_base_again: bool = False
    weight: Any  # nn.Parameter; some quantized bases have a subclass of it
    merged: bool
    #: Share of the update that rounding lost in the last merge.
    merge_loss: float
    _undo: merging.SparseUndo | merging.OriginalUndo | formats.QuantizedUndo | None
    _owns_weight: bool
    _untied: list[Any]
    _digest: str
    _device: torch.device
    _quantized: Quantized | None

    def lora_delta(self) -> Tensor:
        """The update as a dense tensor of the weight's shape, in the adapter's dtype."""
        raise NotImplementedError(f"{type(self).__name__} has to say its dense update")

    def base_weight(self) -> Tensor:
        """The base weight in a floating dtype; that of a quantized base unpacked."""
        # Most are plain parameters, and a compiler cannot look for packings.
        plain = type(self.weight) is nn.Parameter and self.weight.is_floating_point()
        return self.weight if plain else formats.dequantized(self)

    def merge_delta(self) -> Tensor:
        """What merging adds to the weight, computed from the adapter alone; then :meth:`merge_scale` multiplies."""
        return self.lora_delta()

    def merge_scale(self, delta: Tensor) -> Tensor | None:
        """What merging multiplies ``weight + delta`` by, in the weight's shape; None for 1. Asked before the merge only."""
        return None

    def rebase_class(self, base: type[nn.Module]) -> None:
        """Be an adapted layer over another base class."""
        raise NotImplementedError(f"{type(self).__name__} has to know how its class is made")

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The layer's own parameters without the adapter's."""
        return {name: p for name, p in self._parameters.items() if p is not None and not name.startswith(PREFIX)}

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters."""
        return {name: p for name, p in self._parameters.items() if p is not None and name.startswith(PREFIX)}

    @property
    def base_weight_digest(self) -> str | None:
        """Sampled digest of the base weight while it is merged; None when the weight itself can be read."""
        return self._digest if self.merged else None

    def kept_base(self) -> str | Tensor | None:
        """Of a merged layer: the checksum of its base weight (of this rank's piece), or that weight itself where it was kept aside; None if
        the way back was not kept."""
        return self._undo.checksum if isinstance(self._undo, merging.SparseUndo) else None if self._undo is None else self._undo.weight

    def exact_delta(self, device: torch.device | str | None = None) -> Tensor:
        """The dense update with full-precision products, on ``device`` (default: the weight's)."""
        return self._exactly(device, self.lora_delta)

    def merged_weight(self, device: torch.device | str | None = None) -> tuple[Tensor, float]:
        """The weight, whole, as a merge would leave it, and the share of the update that rounding lost; nothing is changed."""
        delta, out_scale = self._exactly(device, self._merge_parts)
        weight = full_tensor(self.weight.detach()) if formats.format_of(self) is None else formats.dequantized(self)
        return merging.merged_weight(weight.to(delta.device), delta, out_scale)

    def _merge_parts(self) -> tuple[Tensor, Tensor | None]:
        delta = self.merge_delta()
        return delta, self.merge_scale(delta)

    def _exactly(self, device: torch.device | str | None, compute: Callable[[], T]) -> T:
        """What a method returns when the adapter is whole, on ``device``, and products are full-precision."""
        own = self._parameters
        target = torch.device(device) if device is not None else self.weight.device
        wide = {name: full_tensor(p.detach()).to(target) for name, p in self.lora_parameters().items()}
        self.__dict__["_parameters"] = {**own, **wide}
        try:
            with merging.exact_matmul():
                return compute()
        finally:
            self.__dict__["_parameters"] = own

    def merge_weights(
        self, *, device: torch.device | str | None = None, reversible: bool = True, quantized: Quantized | None = None
    ) -> None:
        """``weight += scaling · B·A``, summed in fp32 and rounded once; a no-op on a merged layer.

        A weight that another module uses too is replaced, never written to.

        Args:
            device: where to compute (default: the weight's device).
            reversible: keep what :meth:`unmerge_weights` needs.
            quantized: what a quantized weight becomes: one of 16 bit in a plain layer ("dequantize"), or the sum quantized again
                ("requantize").

        Raises:
            ValueError: :meth:`merge_refusal` has a reason.
        """
        if self.merged:
            return
        reason = self.merge_refusal(quantized)
        if reason:
            raise ValueError(reason)
        if formats.format_of(self) is not None:
            self._merge_packed(device, reversible, quantized)
            return
        home, device = self.weight.device, torch.device(device) if device is not None else self.weight.device
        self._digest, self._device = formats.weight_digest(self), device
        delta, out_scale = self._exactly(device, self._merge_parts)
        delta = local_shard(delta, self.weight)
        out_scale = None if out_scale is None else local_shard(out_scale, self.weight)
        if self._owns_weight:
            mine = local_tensor(self.weight.detach())
            weight = mine.to(device)
            self._undo, self.merge_loss = merging.merge(weight, delta, out_scale, reversible=reversible)
            if device != home:
                mine.copy_(weight)
        else:
            shared = self.weight
            merged, self.merge_loss = merging.merged_weight(shared.data.to(device), delta, out_scale)
            self.weight = nn.Parameter(merged.to(home), requires_grad=False)
            self._undo = merging.OriginalUndo(shared) if reversible else None
        self.merged = True

    def _merge_packed(self, device: torch.device | str | None, reversible: bool, quantized: Quantized | None) -> None:
        """Merge into a quantized weight; the packed tensors themselves are kept for the way back."""
        how = formats.format_of(self)
        assert how is not None
        original, digest = formats.take(self, how), formats.weight_digest(self)
        home, self._device = self.weight.device, torch.device(device) if device is not None else self.weight.device
        base, delta = self.base_weight().to(self._device), self.exact_delta(self._device)
        exact = base.to(delta.dtype) + delta
        if quantized == "requantize":
            how.requantize(self, exact.to(home))
        else:
            self.weight = nn.Parameter(exact.to(base.dtype).to(home), requires_grad=False)
            for name in original.attributes:
                del self.__dict__[name]
            if how.plain_class is not None:
                self.rebase_class(how.plain_class)
        lost = (self.base_weight().to(exact) - exact).norm()
        self.merge_loss = float(lost / delta.norm()) if delta.any() else 0.0
        self._undo, self._quantized = original if reversible else None, quantized
        self.merged, self._digest = True, digest

    def merge_refusal(self, quantized: Quantized | None = None) -> str | None:
        """Why the update cannot be merged now; None if it can."""
        how = formats.format_of(self)
        if how is not None:
            if is_sharded(self.weight):
                return "its quantized weight is sharded: save the adapter and merge in a single process"
            if quantized not in ("dequantize", "requantize"):
                return (
                    f"its weight is quantized, and how to merge into that is a choice (quantized={quantized!r}): quantized='dequantize'"
                    " makes it a 16-bit layer, exact to rounding; quantized='requantize' keeps it packed and rounds the update to its grid"
                )
            if quantized == "requantize" and not how.requantizes:
                return f"its weight, a {type(self.weight.data).__name__}, is not packed again here: pass quantized='dequantize'"
        elif not self.weight.is_floating_point():
            kind = f"the weight is quantized ({self.weight.dtype})"
            return f"{kind} and cannot take an update in place: dequantize the base first, or leave it unmerged"
        spoilt = [name for name, p in self.lora_parameters().items() if not full_tensor(p.detach()).isfinite().all()]
        return f"{spoilt[0]} holds NaN or infinity and would spoil the base weight: load a sound adapter first" if spoilt else None

    def unmerge_weights(self) -> None:
        """Put the base weight back bit for bit; a no-op on a layer that is not merged.

        Raises:
            ValueError: the way back was not kept, or the adapter changed since the merge.
        """
        if not self.merged:
            return
        if self._undo is None:
            raise ValueError(
                "the way back was not kept (merged with reversible=False, or other weights were loaded since): load the base model again"
            )
        if isinstance(self._undo, merging.SparseUndo):
            # Where it was merged, for the product has to come out the same to the bit.
            mine = local_tensor(self.weight.detach())
            delta = self._exactly(self._device, self.merge_delta)
            base = merging.unmerge(mine.to(self._device), local_shard(delta, self.weight), self._undo)
            mine.copy_(base)
        elif isinstance(self._undo, formats.QuantizedUndo):
            home = self.weight.device  # the model may have moved since, and what was kept aside did not
            self._undo.put_back(self)
            if self.weight.device != home:
                self.to(home)
        else:
            self.weight = self._undo.weight
        self.merged, self._undo = False, None
        for config in self.__dict__.pop("_untied", ()):
            config.tie_word_embeddings = True

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # a merged layer is a plain layer: carrying the adapter too would apply it twice
            for name in self.lora_parameters():
                del destination[prefix + name]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, _, missing, _, errors = args  # torch's own lists: metadata, strict, missing, unexpected, errors
        comes = any(key.startswith(prefix + PREFIX) for key in state_dict)
        if self.merged and comes:
            self.unmerge_weights()  # an adapter is coming: it belongs on the base
        again = self.lora_base_again and not comes and self._is_base(state_dict.get(prefix + "weight"))
        if self.merged and again:  # the base once more, as a module's `setup` loads it: what was merged into it stays
            state_dict = {key: value for key, value in state_dict.items() if key != prefix + "weight"}
        failed = len(errors)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.merged and again:
            missing.remove(prefix + "weight")
        elif self.merged and prefix + "weight" in state_dict and len(errors) == failed:
            self._undo = None  # other merged weights are in: the way back no longer fits them
        # The base alone may come to a layer that is merged, or whose adapter does nothing yet.
        plain = self.lora_parameters().keys() == {"lora_A", "lora_B"}
        if self.merged or again or (not comes and plain and not all(p.any() for p in self.lora_parameters().values())):
            missing[:] = [key for key in missing if not key.startswith(prefix + PREFIX)]

    def _is_base(self, weight: Any) -> bool:
        """Whether a weight is bit for bit this layer's base weight."""
        if not isinstance(weight, Tensor) or weight.shape != self.weight.shape or is_sharded(self.weight) or weight.is_meta:
            return False
        base = self.kept_base() if self.merged else self.weight.detach()
        weight = weight.to(self.weight.dtype)
        return checksum(weight) == base if isinstance(base, str) else base is not None and torch.equal(weight.to(base.device), base)
