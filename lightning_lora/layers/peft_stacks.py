"""PEFT's form of the factors of stacked weights (``target_parameters``), which two releases write in two ways.

A has the rows of all experts, (E·r, size of one axis of a matrix), expert after expert. B has one row per entry of the other axis and
r·E columns, the experts of one r side by side. PEFT 0.19 and later put A on a matrix's last axis, or on the first where the module says
``is_transposed``. PEFT 0.18 and earlier always put A on the first axis. So B·A may be the transposed update, which is the same pair
exchanged: ``(B·A)ᵀ = Aᵀ·Bᵀ``.
"""

from __future__ import annotations

import re

from torch import Tensor

_FLIPPED = (0, 19)  # the release from which A is on the input's axis, for most models


def to_file(A: Tensor, B: Tensor, *, exchanged: bool) -> tuple[Tensor, Tensor]:
    """Return PEFT's A and B.

    Args:
        A: (E, r, in).
        B: (E, out, r).
        exchanged: True if PEFT's A is on the output's axis.
    """
    A, B = (B.mT, A.mT) if exchanged else (A, B)
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def from_file(A: Tensor, B: Tensor, experts: int, *, exchanged: bool) -> tuple[Tensor, Tensor]:
    """Invert :func:`to_file`."""
    A, B = A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return (B.mT, A.mT) if exchanged else (A, B)


def is_exchanged(A: Tensor, B: Tensor, shape: tuple[int, int, int], transposed: bool, flagged: bool, version: str | None) -> bool:
    """Return True if A of a file is on the output's axis.

    The sizes decide. Only where both are equal, the release that wrote the file does.

    Args:
        A: as in the file.
        B: as in the file.
        shape: (E, out, in).
        transposed: True if the weight is stored (E, in, out).
        flagged: True if the module has a true ``is_transposed``, which PEFT looks at.
        version: the file's ``peft_version``.

    Raises:
        ValueError: the pair does not fit the weight, or nothing says which axis A is on. The message is the reason only.
    """
    experts, outputs, inputs = shape
    found = (A.shape[1:].numel(), B.shape[0])
    fits = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1] and A.shape[0] % experts == 0
    if not fits or found not in ((inputs, outputs), (outputs, inputs)):
        raise ValueError(
            f"A {tuple(A.shape)} and B {tuple(B.shape)} are no pair for {experts} experts of {inputs} inputs and {outputs} outputs"
        )
    if inputs != outputs:
        return found == (outputs, inputs)
    release = re.match(r"(\d+)\.(\d+)", version or "")
    if release is None:
        raise ValueError(
            f"its matrices are square ({inputs}), so the sizes do not say which axis A is on (PEFT changed it in 0.19), and the JSON names"
            " no peft_version: add the release that wrote the file"
        )
    return transposed != flagged if (int(release[1]), int(release[2])) >= _FLIPPED else not transposed
