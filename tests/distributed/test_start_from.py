"""``LoRACallback(start_from=...)`` under every strategy: the first step is that of one process, on the adapter's values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import apply_lora, save_adapter
from tests.distributed.nets import CONFIG, fill_adapters, make_net
from tests.distributed.runs import run
from tests.distributed.test_lightning import close, start

STRATEGIES = ["ddp", "fsdp full", "fsdp2 after", "lora_fsdp2", "tp after"]  # one of each way that adapters are placed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = apply_lora(make_net(), config=CONFIG)
    fill_adapters(model)
    return save_adapter(model, tmp_path_factory.mktemp("adapters") / "adapter")


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run("single", str(tmp_path_factory.mktemp("single")), 1, start_from=str(folder))


@pytest.mark.parametrize("name", STRATEGIES)
def test_starts_as_one_process_does(pool: Any, folder: Path, alone: dict[str, Any], tmp_path: Path, name: str) -> None:
    for rank in start(pool, name, str(tmp_path), 1, start_from=str(folder)):
        assert rank["losses"] == pytest.approx(alone["losses"], abs=1e-6)
        close(rank["adapters"], alone["adapters"])
        close(rank["moments"], alone["moments"])


def test_it_is_another_start_than_a_fresh_adapters(alone: dict[str, Any], tmp_path: Path) -> None:
    fresh = run("single", str(tmp_path), 1)
    assert abs(fresh["losses"][0] - alone["losses"][0]) > 1e-3
    assert not all(torch.allclose(alone["adapters"][name], tensor) for name, tensor in fresh["adapters"].items())
