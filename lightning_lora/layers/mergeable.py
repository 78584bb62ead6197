"""Merges a layer's update into its weight, undoes that, and defines the state dict of a merged layer.

To other code a merged layer is a plain layer. Its state dict has the base's keys only: a file with the adapter's keys too would
apply the update twice. When an adapter is loaded into a merged layer, the layer unmerges first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lightning_lora.layers import merging
from lightning_lora.layers.awaiting import data_came
from lightning_lora.layers.merge_plans import Plan, plan_merge, plan_unmerge
from lightning_lora.layers.rounding import Rounding
from lightning_lora.layers.state import Adapted, AdapterState, Quantized, Untying
from lightning_lora.quantization import formats
from lightning_lora.utils.checksums import checksum
from lightning_lora.utils.parameters import is_computed
from lightning_lora.utils.sharding import full_tensor, is_sharded

PREFIX = "lora_"  # prefix of every parameter that LoRA adds to a layer

T = TypeVar("T")


class Mergeable(Adapted):
    """A layer with a ``weight``, adapter parameters named ``lora_*`` and a dense update :meth:`lora_delta`."""

    #: Names of the parameters that a merge changes.
    adapted: ClassVar[tuple[str, ...]] = ("weight",)
    #: True during Lightning's ``setup``, where a module's own code may load its base weights once more. A state dict that has the base
    #: alone then leaves a merged layer merged, and a trained adapter as it is.
    lora_base_again: bool = False
    weight: Any  # nn.Parameter; some quantized bases have a subclass of it
    disabled: bool

    def lora_delta(self) -> Tensor:
        """Return the update as a dense tensor of the weight's shape, in the adapter's dtype."""
        raise NotImplementedError(f"{type(self).__name__} must define lora_delta")

    def base_weight(self) -> Tensor:
        """Return the base weight in a floating-point dtype. A quantized weight is dequantized."""
        # Most weights are plain parameters, and a compiler cannot trace the search for a quantized format.
        plain = type(self.weight) is nn.Parameter and self.weight.is_floating_point()
        return self.weight if plain else formats.dequantized(self)

    def base_was_loaded(self, loaded: set[str]) -> None:
        """Follow a base weight that came after the adapter, for example onto the meta device.

        What the adapter computed from the earlier weight is computed again if the adapter adds nothing yet.

        Args:
            loaded: names of the adapter parameters that were loaded together with the weight; they stay as they are.
        """

    def merge_delta(self) -> Tensor:
        """Return what a merge adds to the weight, computed from the adapter alone. :meth:`merge_scale` then multiplies the sum."""
        return self.lora_delta()

    def merge_scale(self, delta: Tensor) -> Tensor | None:
        """Return the factor on ``weight + delta`` in a merge, in the weight's shape; None for 1.

        Called only before the merge.
        """
        return None

    def by_weight(self) -> dict[str, Any]:
        """Return the name of each adapted weight → the layer that has it as its ``weight``: this one, unless there are several."""
        return dict.fromkeys(self.adapted, self)

    def merged_beside(self, name: str) -> Tensor | None:
        """Return what a merge makes of another parameter of the layer than its weights, in full. None: it stays as it is."""
        return None

    def base_beside(self, name: str) -> Tensor | None:
        """Return the base's value of another parameter that the present merge changed; None if it changed none of that name."""
        return None if self.lora_state.merge is None else self.lora_state.merge.beside.get(name)

    def rebase_class(self, base: type[nn.Module]) -> None:
        """Switch to an adapted class over another base class."""
        raise NotImplementedError(f"{type(self).__name__} must define rebase_class")

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Return the layer's own parameters without the adapter's."""
        return {name: p for name, p in self._parameters.items() if p is not None and not name.startswith(PREFIX)}

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters."""
        return {name: p for name, p in self._parameters.items() if p is not None and name.startswith(PREFIX)}

    @property
    def replaced_rows(self) -> tuple[int, ...]:
        """Numbers of the weight's rows that the adapter replaces, and that are no part of the base therefore."""
        return ()

    @property
    def followed(self) -> bool:
        """True if a merge is meant for all modules that have the weight."""
        return False

    @property
    def base_weight_digest(self) -> str | None:
        """Sampled digest of the base weight while it is merged; None if the weight itself can be read."""
        record = self.lora_state.merge
        return None if record is None else record.digest

    def kept_base(self) -> str | Tensor | None:
        """Return the checksum of a merged layer's base weight (of this rank's shard), or the weight itself if that was kept.

        None if no undo record was kept.
        """
        undo = None if self.lora_state.merge is None else self.lora_state.merge.undo
        return undo.checksum if isinstance(undo, merging.SparseUndo) else None if undo is None else undo.weight

    def exact_delta(self, device: torch.device | str | None = None) -> Tensor:
        """Return the dense update, computed with full-precision products on ``device`` (default: the weight's device)."""
        return self._exactly(device, self.lora_delta)

    def merged_weight(self, device: torch.device | str | None = None) -> tuple[Tensor, Rounding]:
        """Return the full weight as a merge would leave it, and what rounding lost of the update.

        Changes nothing.
        """
        delta, out_scale = self._merge_parts(device)
        weight = full_tensor(self.weight.detach()) if formats.format_of(self) is None else formats.dequantized(self)
        return merging.merged_weight(weight.to(delta.device), delta, out_scale)

    def _merge_parts(self, device: torch.device | str | None = None, *, scaled: bool = True) -> tuple[Tensor, Tensor | None]:
        """Return what a merge adds and, if ``scaled``, the factor on the sum, computed as by :meth:`exact_delta`."""

        def parts() -> tuple[Tensor, Tensor | None]:
            delta = self.merge_delta()
            return delta, self.merge_scale(delta) if scaled else None

        return self._exactly(device, parts)

    def _exactly(self, device: torch.device | str | None, compute: Callable[[], T]) -> T:
        """Return ``compute()``, run with the adapter's full tensors on ``device`` and full-precision products."""
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
        """Compute ``weight += scaling · B·A``, summed in fp32 and rounded once; do nothing on a merged layer.

        A weight that another module uses too is replaced, never written to.

        Args:
            device: where to compute (default: the weight's device).
            reversible: keep what :meth:`unmerge_weights` needs.
            quantized: what becomes of a quantized weight: a 16-bit weight in a plain layer ("dequantize"), or the sum quantized again
                ("requantize").

        Raises:
            ValueError: :meth:`merge_refusal` returns a reason.
        """
        if self.merged:
            return
        reason = self.merge_refusal(quantized)
        if reason:
            raise ValueError(reason)
        self.merge_plan(device, reversible, quantized)()

    def merge_plan(self, device: torch.device | str | None, reversible: bool, quantized: Quantized | None) -> Plan:
        """Compute the merge of a layer that is not merged and can be merged. Change nothing."""
        return plan_merge(self, device, reversible, quantized)

    def unmerge_plan(self) -> Plan:
        """Compute what undoes the merge of a merged layer. Change nothing.

        Raises:
            ValueError: it cannot be undone.
        """
        return plan_unmerge(self)

    def merge_refusal(self, quantized: Quantized | None = None) -> str | None:
        """Return why the update cannot be merged now; None if it can."""
        if self.disabled:
            return "its adapter is disabled: merge outside of disabled_lora(model)"
        if any(p.is_meta for p in self._parameters.values() if p is not None):
            return "it is on the meta device and has no values: load the model's weights first"
        if is_computed(self, "weight"):
            return "it computes its weight anew at each call (pruning, weight_norm or a parametrization): make that permanent or remove it"
        packing = formats.format_of(self)
        if packing is not None:
            if is_sharded(self.weight):
                return "its quantized weight is sharded: save the adapter and merge in a single process"
            if quantized not in ("dequantize", "requantize"):
                return (
                    f"its weight is quantized, and how to merge into that is a choice (quantized={quantized!r}): quantized='dequantize'"
                    " makes it a 16-bit layer, exact to rounding; quantized='requantize' keeps it packed and rounds the update to its grid"
                )
            if quantized == "requantize" and not packing.requantizes:
                return f"its weight, a {type(self.weight.data).__name__}, is not packed again here: pass quantized='dequantize'"
        elif not self.weight.is_floating_point():
            kind = f"the weight is quantized ({self.weight.dtype})"
            return f"{kind} and cannot be updated in place: dequantize the base first, or leave it unmerged"
        spoilt = [name for name, p in self.lora_parameters().items() if not full_tensor(p.detach()).isfinite().all()]
        return f"{spoilt[0]} holds NaN or infinity and would corrupt the base weight: load a sound adapter first" if spoilt else None

    def unmerge_weights(self) -> None:
        """Restore the base weight bit for bit; do nothing on a layer that is not merged.

        Raises:
            ValueError: no undo record was kept, or the adapter changed since the merge.
        """
        if self.lora_state.merge is not None:
            self.unmerge_plan()()
            self.retie()

    def untie(self, untying: Untying | None) -> None:
        """Repeat what a merge did to separate this layer's weight from weights elsewhere.

        Args:
            untying: what that was; None if the weight is not tied.
        """
        if untying is not None:
            untying.apply()
        self.lora_state.untying = untying

    def retie(self) -> None:
        """Undo what a merge did to separate this layer's weight."""
        if self.lora_state.untying is not None:
            self.lora_state.untying.undo()
        self.lora_state.untying = None

    def merge_again(self, state: AdapterState) -> None:
        """Repeat a merge after an unmerge. Merging is deterministic, so the merged weight is the same as before.

        Args:
            state: a copy of this layer's state, taken before the unmerge.
        """
        assert state.merge is not None
        self.merge_weights(device=state.merge.device, quantized=state.merge.quantized)
        self.untie(state.untying)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # a file with the adapter's keys too would apply the update twice
            for name in self.lora_parameters():
                del destination[prefix + name]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, _, missing, _, errors = args  # torch's own lists: metadata, strict, missing, unexpected, errors
        comes = any(key.startswith(prefix + PREFIX) for key in state_dict)
        if self.merged and comes:
            self.unmerge_weights()  # the adapter that is loaded applies to the base weight
        layers = {prefix + name: layer for name, layer in self.by_weight().items()}
        again = self.lora_base_again and not comes and all(layer._is_base(state_dict.get(key)) for key, layer in layers.items())
        beside = () if self.lora_state.merge is None else self.lora_state.merge.beside
        # The base once more, as `setup` loads it: what is merged stays.
        stays = {*layers, *(prefix + name for name in beside)} if self.merged and again else set()
        failed = len(errors)
        super()._load_from_state_dict({key: value for key, value in state_dict.items() if key not in stays}, prefix, *args)
        for key, layer in layers.items():
            if layer.lora_state.merge is not None and key in state_dict and key not in stays and len(errors) == failed:
                layer.lora_state.merge.undo = None  # the weight was replaced, so the undo record no longer fits it
        missing[:] = [key for key in missing if key not in stays]
        lacks = [key for key in missing if key.startswith(prefix + PREFIX)]
        # The base alone may come to a layer that is merged, or whose adapter does nothing yet.
        if lacks and (self.merged or again or (not comes and self._starts())):
            missing[:] = [key for key in missing if key not in lacks]
        if len(errors) == failed and not self.merged:
            self._follow(state_dict, prefix)

    def _follow(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Call :meth:`base_was_loaded` on each layer whose weight was loaded."""
        came = {id(p) for name, p in self.lora_parameters().items() if prefix + name in state_dict}
        if {id(p) for p in self.lora_parameters().values()} == came:
            data_came(self)
        for name, layer in self.by_weight().items():
            if prefix + name in state_dict:
                layer.base_was_loaded({short for short, p in layer.lora_parameters().items() if id(p) in came})

    def _starts(self) -> bool:
        """Return True if the adapter adds nothing yet. Collective on sharded layers."""
        return not any(p.is_meta for p in self.lora_parameters().values()) and all(
            layer.adds_nothing() for layer in self.by_weight().values()
        )

    def _is_base(self, weight: Any) -> bool:
        """Return True if a weight is bit for bit this layer's base weight."""
        if not isinstance(weight, Tensor) or weight.shape != self.weight.shape or is_sharded(self.weight) or weight.is_meta:
            return False
        base = self.kept_base() if self.merged else self.weight.detach()
        weight = weight.to(self.weight.dtype)
        return checksum(weight) == base if isinstance(base, str) else base is not None and torch.equal(weight.to(base.device), base)
