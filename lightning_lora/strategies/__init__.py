"""What Lightning's strategies need to work with adapters."""

from lightning_lora.strategies.hooks import StrategyHooks, synchronize
from lightning_lora.strategies.support import arrange, check_supported

__all__ = ["StrategyHooks", "arrange", "check_supported", "synchronize"]
