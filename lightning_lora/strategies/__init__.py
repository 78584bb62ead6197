"""Change what Lightning's strategies do: hooks, checkpoints on disk, checks of what is supported, ``lora_fsdp2``.

From here on ``lightning`` may be imported. May import: everything up to ``experimental``.
"""

from lightning_lora.strategies.adapted_part import AdaptedPart
from lightning_lora.strategies.checkpoint_io import DurableCheckpointIO
from lightning_lora.strategies.equal_ranks import check_equal, check_same_settings, synchronize
from lightning_lora.strategies.finite import FiniteCheck
from lightning_lora.strategies.fsdp2 import LoRAFSDP2Strategy
from lightning_lora.strategies.roll_call import RollCall
from lightning_lora.strategies.strategy_hooks import StrategyHooks
from lightning_lora.strategies.support import arrange, check_supported, convert_base

__all__ = [
    "AdaptedPart",
    "DurableCheckpointIO",
    "FiniteCheck",
    "LoRAFSDP2Strategy",
    "RollCall",
    "StrategyHooks",
    "arrange",
    "check_equal",
    "check_same_settings",
    "check_supported",
    "convert_base",
    "synchronize",
]
