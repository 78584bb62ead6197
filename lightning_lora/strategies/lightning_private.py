"""Every private name of Lightning that the package uses: what it is for, and what breaks when it goes.

Lightning is pinned below 2.7 for them. Each fails loudly at the next minor version; none is wrong in silence.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher


def saves_shards(strategy: Strategy) -> bool:
    """Whether the user asked for checkpoints as folders of shards. Without it saving raises."""
    if isinstance(strategy, FSDPStrategy):
        return strategy._state_dict_type == "sharded"
    return isinstance(strategy, ModelParallelStrategy) and bool(strategy._save_distributed_checkpoint)


def set_data_parallel_size(strategy: ModelParallelStrategy, processes: int) -> None:
    """Fill in ``data_parallel_size="auto"``: Lightning takes the number of nodes. Without it ``lora_fsdp2`` raises."""
    if strategy._data_parallel_size == "auto":
        assert isinstance(strategy._tensor_parallel_size, int)
        strategy._data_parallel_size = processes // strategy._tensor_parallel_size


def start_method(strategy: Strategy) -> str | None:
    """How a strategy starts copies of this process ("fork", "spawn"); None if it does not. Without it nothing of ours imports."""
    launcher: Any = strategy.launcher
    return str(launcher._start_method) if isinstance(launcher, _MultiProcessingLauncher) else None


def cli_parser(cli: Any, subcommand: str | None) -> Any:
    """The parser of a sub-command. Without it, as without the next, the command line raises."""
    return cli._parser(subcommand)


def cli_value(cli: Any, key: str) -> Any:
    """A value of the configuration of the sub-command that runs, its classes instantiated."""
    return cli._get(cli.config_init, key)
