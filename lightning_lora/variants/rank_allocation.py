"""Chooses the triplets that AdaLoRA keeps: scores, the budget over time, and the mask (arXiv:2303.10512, section 3).

After each optimizer step, with w a weight and g its gradient in that step::

    I = |w·g|                     sensitivity                    (equation 8)
    Ī = β₁·Ī + (1 − β₁)·I         smoothed                       (equation 9)
    Ū = β₂·Ū + (1 − β₂)·|I − Ī|   its uncertainty                (equation 10)
    s = Ī·Ū                       score of an entry              (equation 11)
    S = s(E) + mean s(A row) + mean s(B column)      of a triplet (equation 7)

The b(t) triplets with the highest S in the whole model stay; E of the others becomes zero. b(t) falls from all triplets to the
target along a cubic (equation 12). As in the authors' code and in PEFT, w is the weight *after* the step. The paper's algorithm
1 uses the weight before it, which differs by one learning rate. Among equal scores the first triplets stay, so that the budget is met
exactly (PEFT prunes every triplet at the threshold). This file does not depend on Lightning: call ``regularize`` before an optimizer
step, ``after_step`` after it, and ``zero_grad`` after that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import lora_layers
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.sharding import (
    broadcast,
    distribute_like,
    full_tensor,
    is_distributed,
    is_sharded,
    local_shard,
    local_tensor,
)
from lightning_lora.variants.adalora import AdaLoRA


class RankAllocator:
    """Reduces the ranks of a model's AdaLoRA layers from those at the start to ``target_rank`` on average.

    Args:
        model: adapted with ``variant="adalora"``; sharded or not.
        target_rank: average rank at the end.
        total_steps: number of optimizer steps of the schedule.
        tinit: steps before pruning begins.
        tfinal: steps at the end during which the ranks stay fixed.
        deltaT: steps between two choices.
        beta1: β₁.
        beta2: β₂.
        orth_reg_weight: γ in the loss + γ·Σ(‖A·Aᵀ − I‖² + ‖Bᵀ·B − I‖²) (equation 4); 0 switches the regularizer off.

    Attributes:
        step: optimizer steps seen.
        keep: module name → which triplets stay, (r,) booleans; empty before the first choice.

    Raises:
        ValueError: the model has no AdaLoRA layers, the target is not below its ranks, or the schedule has no room to prune.

    Examples:
        >>> model = apply_lora(model, LoRAConfig(variant="adalora", rank=4))
        >>> optimizer = torch.optim.AdamW(lora_param_groups(model, lr=1e-2))
        >>> allocator = RankAllocator(model, target_rank=2, total_steps=len(batches))
        >>> for batch in batches:
        ...     model(**batch).loss.backward()
        ...     allocator.regularize()  # adds the regularizer's gradients
        ...     optimizer.step()
        ...     allocator.after_step()
        ...     optimizer.zero_grad()
        >>> ranks = shrink_adalora(model)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_rank: int,
        total_steps: int,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.1,
    ) -> None:
        self.layers = {clean_name(name): layer for name, layer in lora_layers(model) if isinstance(layer, AdaLoRA)}
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no AdaLoRA layers; apply a LoRAConfig with variant='adalora' first.")
        self.start = sum(layer.rank for layer in self.layers.values())
        self.target = target_rank * len(self.layers)
        if self.target >= self.start:
            raise ValueError(
                f"target_rank={target_rank} is not below the rank at the start, {self.start / len(self.layers):g} on average:"
                " there would be nothing to prune."
            )
        if tinit + tfinal >= total_steps:
            raise ValueError(
                f"tinit={tinit} and tfinal={tfinal} leave none of the {total_steps} optimizer steps to prune in: the ranks would"
                " never change. Give smaller ones, or train for longer."
            )
        self.total_steps, self.tinit, self.tfinal, self.deltaT = total_steps, tinit, tfinal, deltaT
        self.beta1, self.beta2, self.orth_reg_weight = beta1, beta2, orth_reg_weight
        self.step = 0
        self.keep: dict[str, Tensor] = {}
        self.parameters = {f"{name}.{part}": p for name, layer in self.layers.items() for part, p in layer.lora_parameters().items()}
        self.sensitivity: dict[str, Tensor] = {}  # Ī, sharded as the parameters are
        self.uncertainty: dict[str, Tensor] = {}  # Ū
        self._clear()

    @property
    def prunes_until(self) -> int:
        """The step of the last choice."""
        return self.total_steps - self.tfinal

    def budget(self, step: int) -> int:
        """Return how many triplets of the whole model stay after this step."""
        if step <= self.tinit:
            return self.start
        if step >= self.prunes_until:
            return self.target
        left = 1 - (step - self.tinit) / (self.prunes_until - self.tinit)
        return int(self.target + (self.start - self.target) * left**3)

    @torch.no_grad()
    def regularize(self, scale: float = 1.0) -> None:
        """Add the regularizer's gradients, 4γ(A·Aᵀ − I)·A and 4γB·(Bᵀ·B − I), to the gradients of the loss.

        They are added once, at the end. So they are exact however the loss was accumulated, averaged or divided.

        Args:
            scale: the loss scale, where the gradients are still multiplied by one.
        """
        if not self.orth_reg_weight:
            return
        for layer in self.layers.values():
            for parameter, rows in ((layer.lora_A, True), (layer.lora_B, False)):
                full = full_tensor(parameter.detach())
                matrix = full.flatten(1) if rows else full.flatten(1).t()  # (r, in) or (r, out)
                gram = matrix @ matrix.t()
                gram.diagonal().sub_(1)
                gradient = (gram @ matrix) * (4 * self.orth_reg_weight * scale)
                gradient = (gradient if rows else gradient.t()).reshape(full.shape).to(parameter.dtype)
                if parameter.grad is None:
                    parameter.grad = distribute_like(gradient.contiguous(), parameter)
                else:
                    local_tensor(_gradient(parameter)).add_(local_shard(gradient, parameter))

    @torch.no_grad()
    def after_step(self) -> None:
        """Score, choose and mask. Call it once after each optimizer step, before its gradients are cleared."""
        self.step += 1
        if self.step < self.prunes_until:
            self._score()
        due = self.tinit < self.step < self.prunes_until and self.step % self.deltaT == 0
        if due or self.step == self.prunes_until:
            self.keep = self._choose(self.budget(self.step))
        if self.step == self.prunes_until:
            self._clear()
        if due or self.step >= self.prunes_until:
            for name, keep in self.keep.items():
                E = self.layers[name].lora_E
                local_tensor(E).masked_fill_(~local_shard(keep.view(-1, 1), E), 0.0)

    def scores(self) -> dict[str, Tensor]:
        """Return module name → the score of each triplet, (r,)."""
        entry = {name: full_tensor(self.sensitivity[name] * self.uncertainty[name]) for name in self.parameters}
        return {
            name: entry[f"{name}.lora_E"].flatten()
            + entry[f"{name}.lora_A"].flatten(1).mean(1)
            + entry[f"{name}.lora_B"].transpose(0, 1).flatten(1).mean(1)
            for name in self.layers
        }

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and full tensors by name, independent of how the model is sharded.

        Every process must call it.
        """
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "keep": {name: keep.cpu() for name, keep in self.keep.items()},
            "sensitivity": {name: full_tensor(tensor).cpu() for name, tensor in self.sensitivity.items()},
            "uncertainty": {name: full_tensor(tensor).cpu() for name, tensor in self.uncertainty.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was called.

        Raises:
            ValueError: the state is of other layers, or of a schedule of another length.
        """
        if state["sensitivity"].keys() != self.parameters.keys():
            different = sorted(state["sensitivity"].keys() ^ self.parameters.keys())
            raise ValueError(f"the checkpoint's AdaLoRA scores are of other layers; {different[0]!r} is only on one side.")
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"total_steps={self.total_steps} here, the checkpoint's schedule has {state['total_steps']}, {state['step']} of them"
                f" done. To continue it, also beyond its end, pass total_steps={state['total_steps']}."
            )
        self.step = state["step"]
        self.keep = {name: keep.to(self.layers[name].lora_E.device) for name, keep in state["keep"].items()}
        for mine, theirs in ((self.sensitivity, state["sensitivity"]), (self.uncertainty, state["uncertainty"])):
            for name, tensor in mine.items():
                local_tensor(tensor).copy_(local_shard(theirs[name], tensor))

    def _clear(self) -> None:
        self.sensitivity = {name: torch.zeros_like(p.detach()) for name, p in self.parameters.items()}
        self.uncertainty = {name: torch.zeros_like(p.detach()) for name, p in self.parameters.items()}

    def _score(self) -> None:
        weights = [local_tensor(p.detach()) for p in self.parameters.values()]
        gradients = [
            torch.zeros_like(w) if p.grad is None else local_tensor(_gradient(p))
            for p, w in zip(self.parameters.values(), weights, strict=True)
        ]
        mean, spread = ([local_tensor(t) for t in kept.values()] for kept in (self.sensitivity, self.uncertainty))
        now = torch._foreach_mul(weights, gradients)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(mean, now, 1 - self.beta1)
        torch._foreach_sub_(now, mean)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(spread, now, 1 - self.beta2)

    def _choose(self, budget: int) -> dict[str, Tensor]:
        scores = self.scores()
        flat = torch.cat(list(scores.values()))
        keep = torch.zeros_like(flat)
        keep[flat.sort(descending=True, stable=True).indices[:budget]] = 1
        if is_distributed():
            # All processes have the same numbers. If one rounds differently, their models must still be the same.
            broadcast([keep], [torch.distributed.group.WORLD])
        parts = keep.bool().split([score.numel() for score in scores.values()])
        return dict(zip(scores, parts, strict=True))


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient with the parameter's placements.

    Tensor parallelism may leave a partial sum; it is reduced here.
    """
    assert parameter.grad is not None
    if is_sharded(parameter) and parameter.grad.placements != parameter.placements:  # type: ignore[attr-defined]
        parameter.grad = parameter.grad.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return parameter.grad


def steps_of(name: str, value: int | float, total: int) -> int:
    """Return a number of steps, which may be given as a share of all steps.

    Raises:
        ValueError: it is neither a whole number ≥ 0 nor a share in [0, 1).
    """
    if isinstance(value, bool) or not math.isfinite(value) or value < 0 or (isinstance(value, float) and value >= 1):
        raise ValueError(f"{name}={value!r}: give a whole number of optimizer steps, or a share of all steps in [0, 1) such as 0.1.")
    return round(value * total) if isinstance(value, float) else value
