"""Which parameters a reducer holds. What it computes is in ``tests/distributed/test_gradient_reducer.py``."""

from __future__ import annotations

import torch
from torch import nn

from lightning_lora.utils.gradient_reducer import GradientReducer, hand_over, kept_reduced


def parameters(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(count)]


def test_parameters_are_handed_over_and_back() -> None:
    old, new, others = parameters(3), parameters(2), parameters(1)
    reducer = GradientReducer([*old, *others], [])
    for before, after in ((old, new), (new, old)):
        hand_over(before, after)
        assert len(reducer.parameters) == len(after) + 1
        assert all(p._lora_reducer is reducer for p in [*after, *others])
        assert not any(hasattr(p, "_lora_reducer") or p._post_accumulate_grad_hooks for p in before)
    hand_over(new, parameters(1))  # these have no reducer
    assert len(reducer.parameters) == 4


def test_frozen_parameters_and_those_of_another_reducer_are_left_out() -> None:
    held, frozen = parameters(2)
    first = GradientReducer([held], [])
    assert GradientReducer([held, frozen.requires_grad_(False)], []).parameters == []
    assert held._lora_reducer is first


def test_swapped_tensors_keep_their_hooks() -> None:
    class Counting(GradientReducer):
        calls = 0

        def _after_accumulation(self) -> None:
            self.calls += 1

    (parameter,) = parameters(1)
    theirs: list[torch.Tensor] = []
    reducer = Counting([parameter], [])
    handle = parameter.register_post_accumulate_grad_hook(theirs.append)  # a user's
    with kept_reduced([parameter]):
        torch.utils.swap_tensors(parameter, nn.Parameter(torch.zeros(2)))
    parameter.sum().backward()
    assert parameter._lora_reducer is reducer and reducer.calls == 1 and len(theirs) == 1
    handle.remove()
    parameter.sum().backward()
    assert reducer.calls == 2 and len(theirs) == 1
