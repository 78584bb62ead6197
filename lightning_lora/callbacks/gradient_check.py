"""Find adapters that no gradient reaches, and name their layers."""

from __future__ import annotations

import re

from torch import nn

from lightning_lora.layers.base import lora_layers
from lightning_lora.utils.messages import counted
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.patterns import grouped

BATCHES = 100  # with a backward pass; a layer that got no gradient in any of them is reported

CURE = (
    "Either the forward pass does not go through these layers (target others), or re-entrant gradient checkpointing cut the graph (pass"
    " use_reentrant=False, or call model.enable_input_require_grads()). If the model uses these layers only rarely, pass"
    " LoRACallback(check_gradients=False)."
)


class GradientCheck:
    """Watches a model's adapters until each has had a gradient. It waits ``BATCHES`` batches, because some models use some layers rarely.

    Args:
        target: the adapted module.
    """

    def __init__(self, target: nn.Module) -> None:
        layers = {clean_name(name): layer for name, layer in lora_layers(target)}
        self.layers = list(layers)
        self._waiting = {name: [p for p in layer.lora_parameters().values() if p.requires_grad] for name, layer in layers.items()}
        self._batches, self._ran = 0, False

    @property
    def waiting(self) -> list[str]:
        """FQNs of the layers that have a parameter without a gradient so far."""
        return [name for name, parameters in self._waiting.items() if parameters]

    def after_backward(self) -> None:
        """Record which adapters have a gradient."""
        self._ran = True
        self._waiting = {name: left for name, parameters in self._waiting.items() if (left := [p for p in parameters if p.grad is None])}

    def after_batch(self) -> None:
        """Count the batch.

        Raises:
            RuntimeError: a layer got no gradient in any of ``BATCHES`` batches.
        """
        self._batches, self._ran = self._batches + self._ran, False
        if self._batches >= BATCHES:
            self.finish()

    def finish(self) -> None:
        """Report the layers without a gradient after the last batch.

        Raises:
            RuntimeError: a layer got no gradient in any batch. The message names all such layers, by pattern.
        """
        waiting, self._waiting = self.waiting, {}
        if waiting and self._batches:
            kinds = grouped(waiting)
            named = ", ".join(f"{shown} ({len(names)} layers)" if len(names) > 1 else names[0] for shown, names in kinds.items())
            raise RuntimeError(
                f"{len(waiting)} of {len(self.layers)} adapted layers got no gradient in {counted(self._batches, 'batch')}: {named}. {CURE}"
                f" To leave them out: exclude_modules={self._patterns(kinds)!r}."
            )

    def _patterns(self, kinds: dict[str, list[str]]) -> list[str]:
        """Return entries for ``exclude_modules``: one regex per group of which no layer is used, else the full names."""
        everyone = grouped(self.layers)
        found = []
        for shown, names in kinds.items():
            whole = len(names) > 1 and everyone[shown] == names
            found += [re.escape(shown).replace(r"\*", r"\d+")] if whole else names
        return found
