"""A module tied to an embedding with rows of its own, such as an output head: it computes with the same rows.

It has no parameter of its own, so there is one for all modules that share the weight. It reads the rows where the embedding has them, and
what is done to them (merging, loading) the embedding does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.factors import Exported
from lightning_lora.layers.replaced_rows import Rows
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.layers.state import AdapterState, Quantized
from lightning_lora.registry import register_kind

KIND = "tied_rows"


@register_kind(name=KIND)
class TiedRows(Rows):
    """A module whose weight is that of a layer with rows of its own, ``lora_source``, whose rows it computes with."""

    lora_source: Rows  # in __dict__: as a child it would have a second name

    @classmethod
    def parameter_shapes(cls, module: Any, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return none."""
        return {}

    def init_adapter(self, spec: LayerSpec) -> None:
        """Only keep the spec. ``lora_source`` is set when all layers are adapted."""
        self.lora_state = AdapterState(spec)
        self.__dict__["lora_dropout"] = nn.Dropout(0.0)

    @classmethod
    def finish(cls, layers: dict[str, LoRALayer]) -> None:
        """Give each tied layer its source."""
        for layer in layers.values():
            if isinstance(layer, TiedRows):
                source = layers[layer.spec.rows_of]
                layer.__dict__["lora_source"], source.__dict__["lora_followed"] = source, True

    @property
    def source(self) -> Rows:
        """The layer that has the rows."""
        return self.lora_source

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TiedRows:
        return nn.Module._apply(self, fn, recurse)

    def reset_lora_parameters(self) -> None:
        """Reset the source's rows: torch has just reset the weight that it shares."""
        self.lora_source.reset_lora_parameters()

    # Merging: it is the source that merges.

    def by_weight(self) -> dict[str, Any]:
        """Return the weight's name → the source, whose weight it is."""
        return {"weight": self.lora_source}

    @property  # type: ignore[misc]  # without a setter: set the source's
    def merged(self) -> bool:
        """True if the source's rows are in the weight."""
        return self.lora_source.merged

    @property
    def merge_loss(self) -> float | None:
        """The source's."""
        return self.lora_source.merge_loss

    def merge_refusal(self, quantized: Quantized | None = None) -> str | None:
        """Return the source's reason."""
        return self.lora_source.merge_refusal(quantized)

    def merge_weights(self, **how: Any) -> None:
        """Merge the source."""
        self.lora_source.merge_weights(**how)

    def unmerge_weights(self) -> None:
        """Unmerge the source."""
        self.lora_source.unmerge_weights()

    def merge_again(self, state: AdapterState) -> None:
        """Do nothing: the source merges again."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)

    def exported(self) -> Exported:
        """Return nothing: PEFT ties it again."""
        return Exported({}, self.rank, self.alpha, self.lora_config)
