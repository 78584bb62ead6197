"""Features that depend on private parts of other libraries. They are imported only where a user asks for them, or where
:mod:`lightning_lora.experimental.trial` finds that they work.

May import: everything up to ``optim``. Only ``strategies`` imports it.
"""

from __future__ import annotations

import torch

TESTED = ("2.11", "2.13", "2.14")  # torch releases with which ``pull_frozen`` was tested
TESTED_ON_GPUS = ("2.11",)  # those of them on which it was tested on GPUs too


def torch_release() -> str:
    """Return this torch's major and minor version."""
    return ".".join(torch.__version__.split(".")[:2])


def check_torch() -> None:
    """Refuse ``pull_frozen`` on an untested torch: with other private parts of FSDP2 it might train on stale weights.

    Raises:
        ValueError: this torch is not one of ``TESTED``.
    """
    if torch_release() not in TESTED:
        raise ValueError(
            f"pull_frozen=True builds on FSDP2's private parts and was tested with torch {', '.join(TESTED)}; this is torch"
            f" {torch.__version__}. Leave it out: FSDP2 trains the same, only slower. Or install one of those."
        )
