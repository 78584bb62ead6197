"""What an adapted layer knows beside its parameters, in one object: it comes and goes with the adapter, whatever is in it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.merging import OriginalUndo, SparseUndo
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.quantization.formats import QuantizedUndo

Quantized = Literal["dequantize", "requantize"]  # how to merge into a quantized weight


@dataclass
class MergeRecord:
    """One merge into one weight, kept until it is undone.

    Attributes:
        undo: what gives the base weight back bit for bit; None if that was not kept.
        digest: sampled digest of the base weight.
        device: where the sum was computed; to take the update out again, the same product has to come out there.
        loss: share of the update that rounding lost, ‖merged − base − Δ‖ / ‖Δ‖.
        quantized: how the update went into a quantized weight.
    """

    undo: SparseUndo | OriginalUndo | QuantizedUndo | None
    digest: str
    device: torch.device
    loss: float
    quantized: Quantized | None = None


@dataclass
class AdapterState:
    """The state of one adapted layer.

    Attributes:
        spec: what the layer is adapted with.
        shares_weight: whether another module uses the weight too. A merge then replaces it and never writes to it.
        merge: the merge that is in the weight now; None if the layer is not merged.
        by_weight: the states of the single weights, by name, of a module that has several; their merges are there.
        untied: configs of Hugging Face models whose ``tie_word_embeddings`` was switched off for that merge.
    """

    spec: LayerSpec
    shares_weight: bool = False
    merge: MergeRecord | None = None
    by_weight: dict[str, AdapterState] = field(default_factory=dict)
    untied: list[Any] = field(default_factory=list)

    def copy(self) -> AdapterState:
        """A state that can change without this one."""
        return replace(self, by_weight={name: state.copy() for name, state in self.by_weight.items()})


class Adapted(nn.Module):
    """A module with an adapter's state, and what users read of it.

    Each read is a call: what runs in every forward pass asks ``lora_state`` itself.
    """

    lora_state: AdapterState

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
        """Scaling numerator."""
        return self.lora_state.spec.alpha

    @property
    def merged(self) -> bool:
        """Whether the update is in the weight."""
        return self.lora_state.merge is not None

    @property
    def merge_loss(self) -> float | None:
        """Share of the update that rounding lost in the merge; None if the layer is not merged."""
        record = self.lora_state.merge
        return None if record is None else record.loss
