"""The forward of a class of experts with other objects in place of its weights: adapted weights, packed ones, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from lightning_lora.ops.low_rank_sum import product_of_sorted_rows
from lightning_lora.utils.transformers_experts import experts_implementation, traced_experts

Weights = Callable[[], Mapping[str, Any]]


class ExpertsForward:
    """Runs a class's own forward on a stand-in of a module.

    Args:
        cls: the class, of transformers or of a user.
    """

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls
        #: Implementation → function that computes it on a stand-in, of those that are part of a compiled graph.
        self.traced: dict[str | None, Callable[..., Any]] = traced_experts(cls, product_of_sorted_rows)
        # Not a decorator: that imports Dynamo, which transformers' models have imported already.
        self.as_it_is = torch.compiler.disable(self._as_it_is)

    def __call__(self, module: nn.Module, weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the output.

        Args:
            module: whose attributes and other parameters the forward reads.
            weights: returns name → what stands for the parameter of that name. Called where it is used: not in a graph of its own.
            args: of the forward.
            kwargs: likewise.
        """
        run = self.traced.get(experts_implementation(module)) if torch.compiler.is_compiling() else None
        return self.as_it_is(module, weights, args, kwargs) if run is None else run(_Traced(self.cls, module, weights()), *args, **kwargs)

    def _as_it_is(self, module: nn.Module, weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stand_in: Any = object.__new__(self.cls)
        stand_in.__dict__.update(module.__dict__, **weights())  # found before the parameters of the same names
        return self.cls.forward(stand_in, *args, **kwargs)


class _Traced:
    """The stand-in for compilers, which would take an ``nn.Module``'s parameters for what it stands for."""

    def __init__(self, cls: type[nn.Module], module: nn.Module, weights: Mapping[str, Any]) -> None:
        self.lora_class, self.lora_layer, self.lora_weights = cls, module, weights

    def __getattr__(self, name: str) -> Any:
        layer = self.lora_layer
        for table in (self.lora_weights, layer.__dict__, layer._parameters, layer._buffers, layer._modules):
            if name in table:
                return table[name]
        found = getattr(self.lora_class, name)
        return partial(found, self) if isinstance(found, FunctionType) else found
