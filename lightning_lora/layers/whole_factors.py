"""Refuse layers whose A and B are no plain pair of matrices: for inits and variants that compute both from a whole matrix.

The message is the reason only; the caller adds the layer's name.
"""

from __future__ import annotations

import math
from typing import Any

from lightning_lora.layers.spec import LayerSpec

Shape = tuple[int, ...]


def check_pairs(module: Any, spec: LayerSpec, A: Shape, B: Shape, what: str) -> None:
    """Check that row i of A is multiplied with column i of B alone, and that no row has to stay zero.

    Args:
        module: the layer's module.
        spec: the layer's.
        A: shape of A, (r, …).
        B: shape of B, (out, r, …).
        what: the config's field and value that need this.

    Raises:
        ValueError: A and B are split into groups, or the module has a padding row.
    """
    if (A[0], B[1]) != (spec.rank, spec.rank):
        raise ValueError(f"{what} pairs each row of A with a column of B, and here A and B are split into groups; exclude it")
    if getattr(module, "padding_idx", None) is not None:
        raise ValueError(f"{what} would train the row of padding_idx={module.padding_idx} too; exclude it")


def check_whole(module: Any, spec: LayerSpec, A: Shape, B: Shape, what: str, vectors: int = 1) -> None:
    """Check as :func:`check_pairs`, and that a matrix of the weight's size has enough singular vectors.

    Args:
        vectors: how many are needed for each of the r rows of A.

    Raises:
        ValueError: as there, or the rank is too high.
    """
    check_pairs(module, spec, A, B, what)
    smallest = min(B[0], math.prod(A[1:]))
    if vectors * spec.rank > smallest:
        times = "" if vectors == 1 else f" needs {vectors * spec.rank} singular vectors, which"
        raise ValueError(f"{what} with rank={spec.rank}{times} is above min(in, out)={smallest}; choose a lower rank")
