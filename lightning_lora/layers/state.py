"""The state of an adapted layer besides its parameters, in one object that is created and removed together with the adapter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.merging import OriginalUndo, SparseUndo
from lightning_lora.layers.rounding import Rounding
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.quantization.formats import QuantizedUndo

Quantized = Literal["dequantize", "requantize"]  # how to merge into a quantized weight


@dataclass
class MergeRecord:
    """One merge into one weight, kept until it is undone.

    Attributes:
        undo: the undo record, which restores the base weight bit for bit; None if it was not kept.
        digest: sampled digest of the base weight.
        device: where the sum was computed; unmerging must compute the same product there.
        rounding: what rounding lost of the update; None if code outside this package merged.
        quantized: how the update was merged into a quantized weight.
        beside: name → base value of the layer's other parameters that the merge changed.
    """

    undo: SparseUndo | OriginalUndo | QuantizedUndo | None
    digest: str
    device: torch.device
    rounding: Rounding | None
    quantized: Quantized | None = None
    beside: dict[str, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Share of the update that rounding lost, ‖merged − base − Δ‖ / ‖Δ‖."""
        return 0.0 if self.rounding is None else self.rounding.lost


class Untying(Protocol):
    """A change of the model around a layer. It can be made and undone any number of times."""

    def apply(self) -> None:
        """Make the change."""

    def undo(self) -> None:
        """Undo the change."""


@dataclass
class AdapterState:
    """The state of one adapted layer.

    Attributes:
        spec: what the layer is adapted with.
        shares_weight: True if another module uses the weight too. A merge then replaces it and never writes to it.
        merge: the merge that is in the weight now; None if the layer is not merged.
        by_weight: for a module with several weights, the states of the single weights by name; they hold the merges.
        base_alone: True if the adapter was zeroed because no adapter of its set is active.
        untying: what that merge changed elsewhere to separate a shared weight; layers that share it hold the same object.
    """

    spec: LayerSpec
    shares_weight: bool = False
    merge: MergeRecord | None = None
    by_weight: dict[str, AdapterState] = field(default_factory=dict)
    untying: Untying | None = None
    base_alone: bool = False

    def copy(self) -> AdapterState:
        """Return a copy that can change independently of this state."""
        return replace(self, by_weight={name: state.copy() for name, state in self.by_weight.items()})


class Adapted(nn.Module):
    """A module with an adapter's state, and the properties of it that users read.

    Each property is a Python call, so code that runs in every forward pass reads ``lora_state`` directly.
    """

    lora_state: AdapterState

    @classmethod
    def never_merges(cls, module: Any) -> str | None:
        """Return why the update of a module can never be merged, which is known before training; None if it can."""
        return None

    @property
    def spec(self) -> LayerSpec:
        """What this layer is adapted with."""
        return self.lora_state.spec

    @property
    def lora_config(self) -> LoRAConfig:
        """The config that this layer was made from."""
        return self.lora_state.spec.config

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_state.spec.rank

    @property
    def alpha(self) -> float:
        """Numerator of the scaling."""
        return self.lora_state.spec.alpha

    @property
    def merged(self) -> bool:
        """True if the update is in the weight."""
        return self.lora_state.merge is not None

    @merged.setter
    def merged(self, value: bool) -> None:
        """Record a merge that code outside this package did. It has no undo record, so it cannot be undone here."""
        self.lora_state.merge = MergeRecord(None, "", next(self.parameters()).device, None) if value else None

    @property
    def merge_loss(self) -> float | None:
        """Share of the update that rounding lost in the merge; None if the layer is not merged."""
        record = self.lora_state.merge
        return None if record is None else record.loss
