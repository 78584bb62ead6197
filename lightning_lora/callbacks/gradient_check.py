"""Finds adapters that no gradient reaches, and says which layers they are on."""

from __future__ import annotations

import re

from torch import nn

from lightning_lora.layers.base import lora_layers
from lightning_lora.utils.names import clean_name

BATCHES = 100  # with a backward pass, after which a layer that got no gradient is taken to be out of use

CURE = (
    "Either the forward pass does not go through these layers (target others), or re-entrant gradient checkpointing cut the graph (pass"
    " use_reentrant=False, or call model.enable_input_require_grads()). If they are used only now and then, pass"
    " LoRACallback(check_gradients=False)."
)


class GradientCheck:
    """Watches the adapters of a model until each has had a gradient, for a number of batches: some models use parts now and then.

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
        """Note which adapters have a gradient."""
        self._ran = True
        self._waiting = {name: left for name, parameters in self._waiting.items() if (left := [p for p in parameters if p.grad is None])}

    def after_batch(self) -> None:
        """Count the batch.

        Raises:
            RuntimeError: enough of them went by and a layer got no gradient in any.
        """
        self._batches, self._ran = self._batches + self._ran, False
        if self._batches >= BATCHES:
            self.finish()

    def finish(self) -> None:
        """No more batches come.

        Raises:
            RuntimeError: a layer got no gradient in any of them; the message names all such layers, by pattern.
        """
        waiting, self._waiting = self.waiting, {}
        if waiting and self._batches:
            kinds = grouped(waiting)
            named = ", ".join(f"{shown} ({len(names)} layers)" if len(names) > 1 else names[0] for shown, names in kinds.items())
            raise RuntimeError(
                f"{len(waiting)} of {len(self.layers)} adapted layers got no gradient in {self._batches} batches: {named}. {CURE} To leave"
                f" them out: exclude_modules={self._patterns(kinds)!r}."
            )

    def _patterns(self, kinds: dict[str, list[str]]) -> list[str]:
        """For ``exclude_modules``: one regex for layers of which none is used, the full names else."""
        everyone = grouped(self.layers)
        found = []
        for shown, names in kinds.items():
            whole = len(names) > 1 and everyone[shown] == names
            found += [re.escape(shown).replace(r"\*", r"\d+")] if whole else names
        return found


def grouped(names: list[str]) -> dict[str, list[str]]:
    """Names that differ in numbers only, under the name with ``*`` for them."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    return kinds
