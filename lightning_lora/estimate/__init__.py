"""How much memory a training step will take, how long it will take, and what makes it fit: from shapes alone, no weights, no GPU.

May import: everything up to ``tasks``.
"""

from lightning_lora.estimate.fits import Fit, largest_fit
from lightning_lora.estimate.memory import Estimate, Setting, estimate_memory
from lightning_lora.estimate.seconds import estimate_seconds

__all__ = ["Estimate", "Fit", "Setting", "estimate_memory", "estimate_seconds", "largest_fit"]
