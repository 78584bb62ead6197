"""What :class:`~lightning_lora.callbacks.monitor.LoRAMonitor` measured: one row of numbers per layer and measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KEPT = 256  # measurements; beyond, every second one is dropped, so that checkpoints and the report stay small
QUANTITIES = ("update_ratio", "update_norm", "stable_rank", "effective_rank", "grad_A", "grad_B", "grad")


@dataclass
class History:
    """The measurements of one run, and the losses of its validations.

    Attributes:
        names: of the layers, in the model's order.
        steps: optimizer steps taken before each measurement, ascending.
        rows: a tensor (layers, quantities) for each step, float64 on the CPU; the quantities are :data:`QUANTITIES`.
        losses: ``(step, {name: value})`` of logged metrics with "loss" in their names, at each validation.
    """

    names: list[str]
    steps: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    losses: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def add(self, step: int, rows: Sequence[Sequence[float]]) -> None:
        """Add a measurement, in the order of ``names``. If there are too many, keep every second and the newest."""
        self.steps.append(step)
        self.rows.append(torch.tensor(rows, dtype=torch.float64).view(len(self.names), len(QUANTITIES)))
        if len(self.steps) > KEPT:
            kept = [*range(0, KEPT, 2), KEPT]
            self.steps, self.rows = [self.steps[i] for i in kept], [self.rows[i] for i in kept]

    def of(self, quantity: str) -> Tensor:
        """Return one quantity, (measurements, layers)."""
        column = QUANTITIES.index(quantity)
        return torch.stack([row[:, column] for row in self.rows]) if self.rows else torch.empty(0, len(self.names), dtype=torch.float64)

    def forget_after(self, step: int) -> None:
        """Drop what was measured after a step, or at it: a run that starts there measures that again."""
        kept = [i for i, at in enumerate(self.steps) if at < step]
        self.steps, self.rows = [self.steps[i] for i in kept], [self.rows[i] for i in kept]
        self.losses = [entry for entry in self.losses if entry[0] <= step]

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and one tensor."""
        values = torch.stack(self.rows) if self.rows else torch.empty(0, len(self.names), len(QUANTITIES), dtype=torch.float64)
        return {"names": list(self.names), "steps": list(self.steps), "values": values, "losses": [list(entry) for entry in self.losses]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> History:
        """Invert :meth:`state_dict`."""
        losses = [(int(step), dict(values)) for step, values in state["losses"]]
        return cls(list(state["names"]), list(state["steps"]), list(state["values"].cpu().double().unbind()), losses)
