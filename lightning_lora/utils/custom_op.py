"""Functions that a compiler calls but does not look into: it would copy what they add to in place.

Eager code calls the function itself, which costs nothing; under ``torch.compile`` the call becomes one operation of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

_LIBRARY = library.Library("lightning_lora", "DEF")
_OPERATIONS: dict[Callable[..., list[Tensor]], Any] = {}


def register_custom_op(schema: str, function: Callable[..., list[Tensor]], shapes: Callable[..., list[Tensor]]) -> None:
    """Make a function an operation.

    Args:
        schema: its name and signature in torch's schema language.
        function: from tensors to a list of tensors, contiguous, none of them a view of another or of an argument.
        shapes: from the same arguments to empty tensors like the function's.
    """
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]

    def fresh(*operands: Any) -> list[Tensor]:
        """An operation may not hand back an argument."""
        given = {id(t) for operand in operands for t in (operand if isinstance(operand, (list, tuple)) else (operand,))}
        return [t.clone() if id(t) in given else t for t in function(*operands)]

    _LIBRARY.impl(name, fresh, "CompositeExplicitAutograd")
    library.register_fake(f"lightning_lora::{name}", shapes, lib=_LIBRARY)
    _OPERATIONS[function] = getattr(torch.ops.lightning_lora, name).default


def dispatch(function: Callable[..., list[Tensor]], *operands: Any) -> list[Tensor]:
    """The function's result, through its operation where a compiler is tracing."""
    return (_OPERATIONS[function] if torch.compiler.is_compiling() else function)(*operands)
