"""The losses and gradients of several trials' batches from one forward and one backward pass.

The gradient of the sum of all losses is each trial's own gradient, because no row depends on another trial's parameters. Whether the model
keeps rows apart is not assumed: at a trial's first batch its loss, gradients and random numbers are compared with those that it computes
alone.

Source: the base's products of several jobs as one, "ASPEN"/mLoRA (arXiv:2312.02515) and LoRAFusion (arXiv:2510.00206).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import lora_layers
from lightning_lora.trials.layout import Layout
from lightning_lora.trials.routes import Routes
from lightning_lora.trials.turns import Turn
from lightning_lora.utils.names import join
from lightning_lora.utils.transformers_conventions import checkpoints_itself
from lightning_lora.utils.values import nonfinite


@dataclass(frozen=True)
class Member:
    """A trial that takes part in joint steps.

    Attributes:
        turn: the run, which waits.
        module: its LightningModule, with ``training_loss``, ``join`` and ``losses_by_owner`` as the package's tasks have.
        trainer: its Trainer.
        parameters: what trains.
    """

    turn: Turn
    module: Any
    trainer: Any
    parameters: list[nn.Parameter]


@dataclass(frozen=True)
class Result:
    """A trial's loss, and the gradient of each of its parameters, None where there is none."""

    loss: Tensor
    gradients: Sequence[Tensor | None]

    def as_loss(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the loss as a tensor whose backward pass gives these gradients."""
        loss: Tensor = _Given.apply(self.loss, self.gradients, *parameters)
        return loss

    def is_finite(self) -> bool:
        """Return True if neither loss nor gradients hold NaN or infinity."""
        return not nonfinite({str(k): value for k, value in enumerate((self.loss, *self.gradients)) if value is not None})


class JointStep:
    """Computes joint steps. It remembers which trials it has compared with themselves alone.

    Attributes:
        forwards: passes through the model so far, those of the comparison included.
        steps: steps of trials so far.
    """

    def __init__(self) -> None:
        self._compared: set[Turn] = set()
        self._diverged: set[Turn] = set()
        self._routes: Routes | None = None
        self.forwards = self.steps = 0

    def __call__(self, members: Sequence[Member], batches: Sequence[Any]) -> list[Result]:
        """Return each trial's result.

        Raises:
            ValueError: the trials cannot be computed together; the reason only.
        """
        self.steps += len(members)
        new = [k for k, member in enumerate(members) if member.turn not in self._compared | self._diverged]
        before = [member.turn.random_numbers for member in members]
        owners = [each for k in new for each in members[k].module.named_modules()]
        buffers = [(fqn, owner, name, b, b.clone()) for fqn, owner in owners for name, b in owner._buffers.items() if b is not None]
        try:
            with ExitStack() as context:
                context.enter_context(members[0].trainer.precision_plugin.train_step_context())
                context.enter_context(torch.enable_grad())
                alone = {k: self._alone(members[k], batches[k]) for k in new}
                results = self._results(members, batches)
            for fqn, owner, name, buffer, value in buffers:
                if owner._buffers[name] is not buffer or not torch.equal(buffer, value):
                    raise ValueError(f"{join(fqn, name)} changes in every step")
            for k, (result, drawn) in alone.items():
                if not all(map(torch.equal, drawn, members[k].turn.random_numbers)):
                    again = any(map(checkpoints_itself, members[k].module.modules()))
                    why = ": gradient checkpointing draws each trial's dropout again in the backward pass" if again else ""
                    raise ValueError(f"the model draws other random numbers for several trials than for one{why}")
                if result.is_finite() or results[k].is_finite():  # else it has diverged before its first batch
                    _compare(results[k], result, members[k])
        except ValueError:  # the trials go on alone, from where they were
            for member, state in zip(members, before, strict=True):
                member.turn.random_numbers = state
            with torch.no_grad():
                for _, owner, name, buffer, value in buffers:
                    owner._buffers[name] = buffer.copy_(value)
            raise
        self._compared.update(member.turn for member in members)
        return results

    def _results(self, members: Sequence[Member], batches: Sequence[Any]) -> list[Result]:
        """Return each trial's result. A trial that has diverged is computed alone: in one row, its NaN would reach the others."""
        well = [k for k, member in enumerate(members) if member.turn not in self._diverged]
        before = [member.turn.random_numbers for member in members]
        found: dict[int, Result] = {}
        if well:
            layout, results = self._together([members[k] for k in well], [batches[k] for k in well])
            if layout.end_to_end and (bad := [k for k, result in zip(well, results, strict=True) if not result.is_finite()]):
                nan_losses = [k for k in bad if not math.isfinite(float(results[well.index(k)].loss))]
                self._diverged.update(members[k].turn for k in nan_losses or bad)
                for member, state in zip(members, before, strict=True):
                    member.turn.random_numbers = state
                return self._results(members, batches)
            found = dict(zip(well, results, strict=True))
        for k in range(len(members)):
            if k not in found:
                found[k], members[k].turn.random_numbers = self._alone(members[k], batches[k])
        return [found[k] for k in range(len(members))]

    def _alone(self, member: Member, batch: Any) -> tuple[Result, tuple[Tensor, ...]]:
        """Return what a trial computes alone, and its random numbers after that. Those of the trial stay as they are."""
        self.forwards += 1
        before = member.turn.random_numbers
        with member.turn.drawing():
            loss = type(member.module).training_loss(member.module, batch)  # on the instance it waits for a joint step
            gradients = _gradients(loss, member.parameters)
        after, member.turn.random_numbers = member.turn.random_numbers, before
        return Result(loss.detach(), gradients), after

    def _together(self, members: Sequence[Member], batches: Sequence[Any]) -> tuple[Layout, list[Result]]:
        """Return each trial's result, from one pass through the first one's model, and the layout of the joint batch."""
        turns, leader = [member.turn for member in members], members[0].module
        if self._routes is None or self._routes.turns != turns:
            self._routes = Routes([member.module for member in members], turns)
        batch, layout, owner = leader.join(batches)
        self.forwards += 1
        with self._routes.through(layout):
            losses = leader.losses_by_owner(batch, owner, len(members))
            parameters = [p for member in members for p in member.parameters]
            gradients = _gradients(losses.sum(), parameters)
        results = []
        for k, member in enumerate(members):
            results.append(Result(losses[k].detach(), gradients[: len(member.parameters)]))
            gradients = gradients[len(member.parameters) :]
        return layout, results


def why_not(module: Any, callback: Any) -> str | None:
    """Return why a run cannot take part in joint steps, None if it can as far as can be known before its first step.

    Args:
        module: its LightningModule, adapted.
        callback: its LoRACallback, None without one.
    """
    if any(getattr(module, name, None) is None for name in ("training_loss", "join", "losses_by_owner")):
        return f"{type(module).__name__} does not say how the losses of several runs are computed together"
    if callback is None or not any(True for _ in lora_layers(module)):
        return "it trains every weight"
    for name in ("compile", "offload", "checkpointing"):
        if getattr(callback, name):
            return f"{name}={getattr(callback, name)!r} works on the blocks of one model"
    if module.trainer.precision == "16-mixed":
        return "precision=16-mixed scales each loss, and a joint step has one scale"
    return None


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    with torch.autocast(loss.device.type, enabled=False):
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def _compare(mine: Result, alone: Result, member: Member) -> None:
    """Raise ValueError if a trial's result differs from what it computes alone by more than its dtype rounds."""
    dtype = min((p.dtype for p in member.module.parameters() if p.is_floating_point()), key=lambda dtype: dtype.itemsize)
    tolerance = min(0.2, 8 * torch.finfo(dtype).eps ** 0.5)
    names = {id(p): name for name, p in member.module.named_parameters()}
    pairs = [("the loss", mine.loss, alone.loss)]
    for parameter, one, other in zip(member.parameters, mine.gradients, alone.gradients, strict=True):
        if (one is None) != (other is None):
            raise ValueError(f"{names[id(parameter)]} has a gradient in one of the two only")
        if one is not None and other is not None:
            pairs.append((f"the gradient of {names[id(parameter)]}", one, other))
    largest = max(float(other.norm()) for _, _, other in pairs[1:]) if len(pairs) > 1 else 0.0
    for what, one, other in pairs:
        size = float(other.norm()) + (0.01 * largest if other is not alone.loss else 0.0)
        if not float((one - other).norm()) <= tolerance * size:
            raise ValueError(f"{what} is another when several trials are computed together: the model does not keep rows apart")


class _Given(torch.autograd.Function):
    """A value with given gradients."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (scale,) = grads
        return None, None, *(None if gradient is None else gradient * scale.to(gradient.dtype) for gradient in ctx.gradients)
