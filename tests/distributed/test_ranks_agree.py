"""Ranks that started apart, or drifted apart, through ``LoRACallback``'s own runs: the first are made equal, the second are an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist

from lightning_lora.layers import lora_layers
from tests.distributed.runs import STRATEGIES, run


def run_apart(name: str, folder: str) -> dict[str, Any]:
    """A run in which every rank draws other adapters."""
    return run(name, folder, 1, seed=7 + dist.get_rank())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run of the first rank's seed in one process."""
    return run("single", str(tmp_path_factory.mktemp("alone")), 1)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "single"])
def test_ranks_of_different_seeds_train_the_first_ranks_adapter(pool: Any, alone: dict[str, Any], tmp_path: Path, name: str) -> None:
    """Before and after wrapping. Under FSDP2 a mixture of two ranks' shards would be equal everywhere: one process says what is right."""
    first, second = pool.run(run_apart, name, str(tmp_path))
    torch.testing.assert_close(second["adapters"], first["adapters"], rtol=0, atol=0)
    torch.testing.assert_close(first["adapters"], alone["adapters"], rtol=0, atol=1e-6)
    assert first["losses"] == pytest.approx(alone["losses"], abs=1e-6)


class Nudge(L.Callback):
    """Moves one adapter of the second rank after the first step."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1 and dist.get_rank() == 1:
            with torch.no_grad():
                next(lora_layers(pl_module))[1].lora_A.add_(1e-3)


def run_nudged(name: str, folder: str) -> str:
    with pytest.raises(RuntimeError) as error:
        run(name, folder, 1, more=(Nudge(),))
    return str(error.value)


@pytest.mark.parametrize("name", ["ddp", "fsdp full", "fsdp after", "lora_fsdp2 pulled"])
def test_a_rank_that_drifts_in_the_first_step_is_an_error(pool: Any, tmp_path: Path, name: str) -> None:
    """Where every rank holds the adapter whole; on each rank, at the second step."""
    for message in pool.run(run_nudged, name, str(tmp_path)):
        assert "1 trained parameter differs between processes after the first step, first net.layers.0.q.lora_A" in message
