"""Average the gradients of replicated parameters over processes, where no wrapper does it.

Every rank ends each backward pass with the same gradients, as under DDP. A rank whose batch did not use a parameter counts as zero, and
gets the mean of all. A parameter that no rank used keeps no gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lora.utils.sharding import is_sharded, local_tensor, with_local
from lightning_lora.utils.torch_private import after_backward_pass, backward_pass_id, revive_hooks


class GradientReducer:
    """Average the gradients of some parameters over process groups, once at the end of every backward pass.

    Reducing is linear, so gradients that accumulate over several backward passes are averaged correctly too.

    Each rank's pass has to reach at least one of the parameters. A rank whose pass reaches none of them takes no part, and the others
    wait for it until the process group's time-out.

    Args:
        parameters: replicated on every rank of the groups; they may be sharded along other mesh dimensions.
        groups: process groups, averaged over one after the other.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], groups: Sequence[Any]) -> None:
        self.parameters: list[nn.Parameter] = []
        self.groups = list(groups)
        self._handles: list[Any] = []  # of the parameters' hooks
        self._queued = -1  # the id of the backward pass that will reduce; not a flag, since a pass that raised never reduces
        self.add(parameters)

    def add(self, parameters: Iterable[nn.Parameter]) -> None:
        """Reduce these parameters too, unless they are frozen or have a reducer: when a module is fitted again, they have one."""
        # The garbage collector does not see hooks: a strong reference in one would keep the parameters forever.
        accumulated = weakref.WeakMethod(self._after_accumulation)
        for parameter in parameters:
            if parameter.requires_grad and not hasattr(parameter, "_lora_reducer"):
                parameter._lora_reducer = self  # type: ignore[attr-defined]
                self.parameters.append(parameter)
                self._handles.append(parameter.register_post_accumulate_grad_hook(lambda _: accumulated()()))  # type: ignore[misc]

    def remove(self, parameters: Iterable[nn.Parameter]) -> None:
        """Reduce these parameters no longer."""
        gone = set(parameters)
        for parameter, handle in zip(self.parameters, self._handles, strict=True):
            if parameter in gone:
                handle.remove()
                del parameter._lora_reducer  # type: ignore[attr-defined]
        left = [index for index, parameter in enumerate(self.parameters) if parameter not in gone]
        self.parameters, self._handles = [self.parameters[i] for i in left], [self._handles[i] for i in left]

    def _after_accumulation(self) -> None:
        this = backward_pass_id()
        if this != self._queued and dist.is_initialized():  # without process groups the module may still train, on one device
            self._queued = this
            after_backward_pass(self._reduce)

    @torch.no_grad()
    def _reduce(self) -> None:
        self._queued = -1
        # Reduce all parameters on every rank, even those that this rank's batch did not use: collectives have to match.
        grads = [_local_gradient(parameter) for parameter in self.parameters]
        flat = [grad.flatten().to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
        used = torch.ones(len(grads), device=grads[0].device)
        unused = [index for index, parameter in enumerate(self.parameters) if parameter.grad is None]
        for index in unused:
            used[index].zero_()
        whole = torch.cat([*flat, used])
        for group in self.groups:
            dist.all_reduce(whole, group=group)
            whole /= dist.get_world_size(group)
        *means, used = whole.split([*(grad.numel() for grad in grads), len(grads)])
        torch._foreach_copy_(grads, [mean.view_as(grad) for grad, mean in zip(grads, means, strict=True)])  # few launches for all
        shares = used.tolist() if unused else []  # reading them makes the CPU wait for a GPU: only where a gradient is missing
        for index in unused:
            if shares[index] > 0:
                self.parameters[index].grad = with_local(grads[index], self.parameters[index])


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    """Return this rank's local shard of a gradient, zeros if there is none."""
    if parameter.grad is None:
        return torch.zeros_like(local_tensor(parameter))
    if is_sharded(parameter) and parameter.grad.placements != parameter.placements:  # type: ignore[attr-defined]
        # A partial sum on one rank and zeros on another would be given different placements.
        parameter.grad = parameter.grad.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return local_tensor(parameter.grad)


def hand_over(before: Iterable[nn.Parameter], after: Iterable[nn.Parameter]) -> None:
    """Reduce parameters in place of those that they replace. Do nothing if those have no reducer."""
    before = list(before)
    reducer = next((parameter._lora_reducer for parameter in before if hasattr(parameter, "_lora_reducer")), None)
    if reducer is not None:
        reducer.remove(before)
        reducer.add(after)


@contextmanager
def kept_reduced(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Keep the parameters' reducers while torch may swap their tensors, as ``nn.Module.to`` does with DTensors."""
    held = [(parameter, parameter._lora_reducer) for parameter in parameters if hasattr(parameter, "_lora_reducer")]
    try:
        yield
    finally:
        for parameter, reducer in held:
            if not hasattr(parameter, "_lora_reducer"):
                parameter._lora_reducer = reducer
                revive_hooks(parameter)
