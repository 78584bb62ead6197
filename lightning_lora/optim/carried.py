"""Carry what an optimizer keeps of an adapter's factor over to another rank.

The directions that stay change their basis, gradients by a matrix N (:mod:`lightning_lora.ops.other_rank`); others are new. Of each kind:

- averages of gradients follow exactly, ``N·m``: the map is linear. New directions begin at zero;
- averages of squares cannot, for the products of different rows were never kept. Rows count as uncorrelated around their mean, as in
  LDAdam (arXiv:2410.16103): ``v ← N²·(v − m²) + (N·m)²``, both free of Adam's bias, where there is an m. It is exact if N permutes and
  scales, and no step becomes larger than Adam's bound. New directions begin at the mean of the others. With zeros their first steps would
  be up to six times too large, because the step count, which is kept, switches off the correction of the bias;
- numbers, such as the step count, stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.optim.state import divides_state

_AVERAGES = ("exp_avg", "momentum_buffer")
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


@dataclass(frozen=True)
class FactorChange:
    """How one factor changes.

    Attributes:
        parameter: the factor.
        shape: of its new values.
        apart: takes a tensor of the parameter's shape apart into directions, (pairs, r, columns) each.
        together: puts those of the new rank together again.
        values: for each pair the map of the values, (pairs, kept, r).
        gradients: likewise the map of gradients, N.
        fresh: values of the new directions, (pairs, new, columns).
    """

    parameter: nn.Parameter
    shape: tuple[int, ...]
    apart: Callable[[Tensor], list[Tensor]]
    together: Callable[[Sequence[Tensor], Sequence[int]], Tensor]
    values: list[Tensor]
    gradients: list[Tensor]
    fresh: list[Tensor]

    def new_values(self) -> Tensor:
        """Return the factor's new values."""
        blocks = self._blocks(self.parameter.detach())
        kept = [M @ X for M, X in zip(self.values, blocks, strict=True)]
        return self._joined(kept, self.fresh, self.parameter)

    def new_gradient(self) -> Tensor | None:
        """Return the gradient so far. Of new directions it is zero."""
        return None if self.parameter.grad is None else self._average(self.parameter.grad)

    def new_state(self, slots: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the optimizer's state of the factor.

        Args:
            slots: its state now, which :func:`check_carried` has seen.
            group: its parameter group.
        """
        return {name: self._slot(name, slots, group) if _is_of_shape(value, self.parameter) else value for name, value in slots.items()}

    def _slot(self, name: str, slots: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
        if name in _AVERAGES:
            return self._average(slots[name])
        squares, means = self._blocks(slots[name]), None
        if name == "exp_avg_sq" and _is_of_shape(slots.get("exp_avg"), self.parameter) and "betas" in group and slots.get("step"):
            m, v = (1 - float(beta) ** float(slots["step"]) for beta in group["betas"][:2])  # the shares that Adam divides by
            means = [X * (v**0.5 / m) for X in self._blocks(slots["exp_avg"])]  # whose squares are in units of v
        kept = []
        for i, (N, X) in enumerate(zip(self.gradients, squares, strict=True)):
            mean = torch.zeros_like(X) if means is None else means[i]
            kept.append(N.square() @ (X - mean.square()).clamp_min(0) + (N @ mean).square())
        new = [X.mean(1, keepdim=True).expand_as(F) for X, F in zip(squares, self.fresh, strict=True)]
        return self._joined(kept, new, slots[name])

    def _average(self, tensor: Tensor) -> Tensor:
        kept = [N @ X for N, X in zip(self.gradients, self._blocks(tensor), strict=True)]
        return self._joined(kept, [torch.zeros_like(F) for F in self.fresh], tensor)

    def _blocks(self, tensor: Tensor) -> list[Tensor]:
        return self.apart(tensor.detach().cpu().double())

    def _joined(self, kept: Sequence[Tensor], new: Sequence[Tensor], like: Tensor) -> Tensor:
        blocks = [torch.cat((X, F), 1) for X, F in zip(kept, new, strict=True)]
        return self.together(blocks, self.shape).to(like.device, like.dtype).contiguous()


def _is_of_shape(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def check_optimizer(optimizer: Optimizer) -> None:
    """Check that an optimizer keeps its state by parameter.

    Raises:
        ValueError: it divides it among processes, or is around another optimizer.
    """
    name = type(optimizer).__name__
    if divides_state(optimizer):
        raise ValueError(f"{name} divides its state among the processes, so ranks cannot change under it: use the optimizer inside it.")
    if isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        raise ValueError(f"{name} is around another optimizer and keeps a state of its own, so ranks cannot change under it: use that one.")


def check_carried(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Check that the state of some parameters can be carried over to another rank.

    Args:
        optimizer: any.
        parameters: name → factor.

    Raises:
        ValueError: it cannot. The message names the state and the parameter.
    """
    check_optimizer(optimizer)
    for name, parameter in parameters.items():
        slots = optimizer.state.get(parameter, {})
        known = _AVERAGES + _SQUARES
        unknown = next((slot for slot, value in slots.items() if slot not in known and isinstance(value, Tensor) and value.ndim), None)
        if "momentum_buffer" in slots and "square_avg" in slots:
            unknown = "momentum_buffer"  # RMSprop's: of steps, not of gradients
        if unknown is not None:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {unknown!r} of {name!r}, and how that follows another rank is not known: use AdamW,"
                " Adam, SGD, Adagrad or another optimizer that keeps averages of gradients and of their squares."
            )
