"""What leans on private insides of other libraries. It is imported only where a user asks for it by name.

May import: everything up to ``optim``. Only ``strategies`` imports it.
"""

from __future__ import annotations

import torch

TESTED = ("2.11", "2.13", "2.14")  # releases of torch, in whose FSDP2 ``pull_frozen`` was tested


def check_torch() -> None:
    """Refuse ``pull_frozen`` where FSDP2's insides are not known: with others it might train on old weights.

    Raises:
        ValueError: this torch is none of ``TESTED``.
    """
    if ".".join(torch.__version__.split(".")[:2]) not in TESTED:
        raise ValueError(
            f"pull_frozen=True builds on FSDP2's private parts and was tested with torch {', '.join(TESTED)}; this is torch"
            f" {torch.__version__}. Leave it out: FSDP2 trains the same, only slower. Or install one of those."
        )
