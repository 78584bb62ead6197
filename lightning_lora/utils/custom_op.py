"""Register functions as torch custom operators, so that ``torch.compile`` does not trace into them.

Functionalization would clone every tensor that they update in place. Eager code calls the function itself, at no extra cost. Under
``torch.compile`` the call becomes one operation of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, library

_LIBRARY = library.Library("lightning_lora", "DEF")
_OPERATIONS: dict[Callable[..., list[Tensor]], Any] = {}

without_values = False  # true in `shapes_only`; read it here, as an attribute of this module


def register_custom_op(schema: str, function: Callable[..., list[Tensor]], shapes: Callable[..., list[Tensor]]) -> None:
    """Register a function as a custom operator.

    Args:
        schema: its name and signature in torch's schema language.
        function: from tensors to a list of tensors. The results are contiguous, and none is a view of another or of an argument.
        shapes: from the same arguments to empty tensors of the shapes and dtypes of the function's results.
    """
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    lists = [k for k, argument in enumerate(schema.partition("->")[0].split(",")) if "[]" in argument]

    def fresh(*operands: Any) -> list[Tensor]:
        """Clone results that are arguments: an operator may not return an argument."""
        given = set(map(id, operands))
        for k in lists:
            given.update(map(id, operands[k]))
        return [t.clone() if id(t) in given else t for t in function(*operands)]

    _LIBRARY.impl(name, fresh, "CompositeExplicitAutograd")
    library.register_fake(f"lightning_lora::{name}", shapes, lib=_LIBRARY)
    _OPERATIONS[function] = getattr(torch.ops.lightning_lora, name).default


def dispatch(function: Callable[..., list[Tensor]], *operands: Any) -> list[Tensor]:
    """Return the function's result, through its custom operator while a compiler is tracing, or in :func:`shapes_only`."""
    return (_OPERATIONS[function] if without_values or torch.compiler.is_compiling() else function)(*operands)


@contextmanager
def shapes_only() -> Iterator[None]:
    """While active, eager code calls the operators too: on the meta device they give empty results of the right shapes."""
    global without_values
    outer, without_values = without_values, True
    try:
        yield
    finally:
        without_values = outer
