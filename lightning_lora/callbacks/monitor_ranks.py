"""``LoRAMonitor(apply_ranks_at=STEP)``: give the layers the suggested ranks once, in the middle of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lora.callbacks.changed_ranks import apply_ranks
from lightning_lora.callbacks.lora import LoRACallback
from lightning_lora.layers.base import lora_layers
from lightning_lora.model.layer_statistics import low_rank_layers, spectra
from lightning_lora.model.rank_advice import advise_ranks, within_budget
from lightning_lora.optim.carried import check_carried
from lightning_lora.optim.resize import check_resizing
from lightning_lora.utils.messages import counted
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.sharding import is_distributed


class RankChange:
    """The one change of ranks in a run.

    Args:
        at: number of optimizer steps after which it is made; None: never.
        energy: share of ``‖ΔW‖²`` that a layer's rank keeps.
        budget: share of the parameters of A and B that there may be afterwards.

    Attributes:
        step: after which it was made; None if it was not yet.
        ranks: name → rank before and after, of the layers whose rank changed.

    Raises:
        ValueError: an argument is out of range.
    """

    #: State of a run without one.
    NONE: ClassVar[dict[str, Any]] = {"step": None, "ranks": {}}

    def __init__(self, at: int | None, energy: float, budget: float) -> None:
        if at is not None and (type(at) is not int or at < 1):
            raise ValueError(f"apply_ranks_at={at!r}: give a number of optimizer steps ≥ 1, such as 500, or None for never.")
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < float("inf"):
            raise ValueError(f"rank_budget={budget!r}: give a share > 0 of the present parameters, such as 1.0.")
        if at is None and budget != 1:
            raise ValueError(f"rank_budget={budget!r} is for ranks that are applied: give apply_ranks_at too.")
        self.at, self.energy, self.budget = at, energy, budget
        self.step: int | None = None
        self.ranks: dict[str, tuple[int, int]] = {}
        self._seen = False  # the optimizers' state

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Check that it can be made, if it is still to come. Forget one that this run has not reached.

        Raises:
            ValueError: a layer, an optimizer, the strategy or a mode does not allow it. The message names it.
        """
        if self.step is not None and self.step > trainer.global_step:
            self.step, self.ranks = None, {}
        self._seen = False
        if self.at is None or self.step is not None:
            return
        callbacks = _callbacks(trainer)
        if not callbacks:
            raise ValueError(
                f"apply_ranks_at={self.at}: without LoRACallback no checkpoint would know the new ranks: adapt the module with it."
            )
        if any(callback.cuda_graphs for callback in callbacks):
            raise ValueError(f"apply_ranks_at={self.at}: recorded CUDA graphs read A and B where they were: leave cuda_graphs out.")
        try:
            check_resizing(module, trainer.strategy.optimizers)
        except ValueError as error:
            raise ValueError(f"apply_ranks_at={self.at}: {error} Leave it out.") from error
        within_budget(module, *_present(module), self.budget)  # raises if not even the lowest ranks fit

    def after_batch(self, trainer: Trainer, module: LightningModule) -> None:
        """Make the change if it is time. Every process calls it."""
        if self.at is None or self.step is not None:
            return
        if not self._seen and trainer.global_step > 0:  # now the optimizers have a state: not only at the step of the change
            self._seen = True
            names = {clean_name(name): p for name, p in module.named_parameters()}
            factors = [(clean_name(name), layer.lora_parameters()) for name, layer in lora_layers(module) if layer.low_rank]
            for optimizer in trainer.strategy.optimizers:
                check_carried(optimizer, {f"{name}.{short}": names[f"{name}.{short}"] for name, own in factors for short in own})
        if trainer.global_step >= self.at:
            self._apply(trainer, module)

    def finish(self, trainer: Trainer) -> None:
        """Warn if the run ended before the change."""
        if self.at is not None and self.step is None:
            rank_zero_warn(f"apply_ranks_at={self.at}, and the run ended after {trainer.global_step} optimizer steps: no rank changed.")

    def _apply(self, trainer: Trainer, module: LightningModule) -> None:
        found = {name: update.values for name, update in spectra(low_rank_layers(module)).items()}
        try:
            told = [within_budget(module, found, advise_ranks(module, found, self.energy), self.budget)]
        except ValueError as error:  # layers that did not train keep their rank, and so many were not foreseen
            rank_zero_warn(f"After step {trainer.global_step} no rank changes: {error}")
            told = [{}]
        if is_distributed():
            torch.distributed.broadcast_object_list(told)  # sums may differ by rounding between machines
        before = _size(module)
        self.ranks, self.step = apply_ranks(trainer, module, _callbacks(trainer), told[0]), trainer.global_step
        shrink = sum(after < was for was, after in self.ranks.values())
        what = (
            f"{counted(shrink, 'layer', 'have')} a lower rank, {len(self.ranks) - shrink} a higher one"
            if self.ranks
            else "no layer has another rank"
        )
        rank_zero_info(f"LoRAMonitor: after step {self.step} {what}. Parameters of A and B: {before:,} before, {_size(module):,} now.")

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"step": self.step, "ranks": {name: list(each) for name, each in self.ranks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of the run that is resumed."""
        self.step, self.ranks = state["step"], {name: (before, after) for name, (before, after) in state["ranks"].items()}


def _callbacks(trainer: Trainer) -> list[LoRACallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, LoRACallback)]  # type: ignore[attr-defined]


def _present(module: LightningModule) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Return a spectrum and a rank for each layer, as if each needed its own rank: to see what a budget allows."""
    layers = {clean_name(name): layer for name, layer in lora_layers(module) if layer.low_rank}
    values = {name: torch.ones(layer.rank) for name, layer in low_rank_layers(module).items()}
    return values, {name: layer.rank for name, layer in layers.items()}


def _size(module: LightningModule) -> int:
    return sum(p.numel() for layer in low_rank_layers(module).values() for p in layer.lora_factors())
