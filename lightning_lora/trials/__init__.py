"""Several runs over one base in one process: they take turns, share what is frozen, and train side by side where that is exact.

May import: everything up to ``callbacks``.
"""

from lightning_lora.trials.one_run import Outcome
from lightning_lora.trials.side_by_side import SideBySide, Trial

__all__ = ["Outcome", "SideBySide", "Trial"]
