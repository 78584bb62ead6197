"""Copy and pickle the hooks that a run leaves on its strategy, so that ``torch.save(trainer)`` works as in plain Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy

from lightning_lora.strategies.changed_state import ChangedState


class CopiedHooks:
    """What copies and pickles of the hooks hold. The copied module gets the records of what changed in the first one.

    Left out are weak references and functions. Those are made anew from the copied module and strategy.
    """

    strategy: Strategy
    module: LightningModule
    state: ChangedState
    originals: dict[str, Callable[..., Any]]

    def __getstate__(self) -> dict[str, Any]:
        records = {name: value for name, value in vars(self.state).items() if name not in ("_module", "wrapped")}
        return vars(self) | {"state": records, "originals": dict.fromkeys(self.originals), "_watching": None}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        vars(self).update(saved)
        self.state = ChangedState.of(self.module)
        vars(self.state).update(saved["state"])
        # The strategy may have its hooks already, so its own methods are looked up in its class.
        self.originals = {name: getattr(type(self.strategy), name).__get__(self.strategy) for name in saved["originals"]}
