"""Single parameters that train in full, under strategies: as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import LoRAConfig
from tests.distributed.runs import run

CONFIG = LoRAConfig(rank=2, target_modules=["q", "v"], modules_to_save=["head.bias", "embed.weight"])


def run_with(name: str, folder: str) -> dict[str, Any]:
    return run(name, folder, 2, config=CONFIG, save=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_with("single", str(tmp_path_factory.mktemp("alone")))


@pytest.mark.parametrize("name", ["ddp", "fsdp full", "fsdp2 full", "lora_fsdp2"])
def test_single_parameters_train_as_in_one_process(pool: Any, alone: dict[str, Any], tmp_path: Path, name: str) -> None:
    assert {"net.head.bias", "net.embed.weight"} <= set(alone["trained"])
    assert not {"net.head.weight", "net.embed.bias"} & set(alone["trained"])
    for rank in pool.run(run_with, name, str(tmp_path)):
        assert rank["losses"] == pytest.approx(alone["losses"], abs=1e-6)
        assert rank["trained"] == alone["trained"] and rank["saved"]["names"] == alone["saved"]["names"]
        for key, tensor in alone["moments"].items():
            torch.testing.assert_close(rank["moments"][key], tensor, rtol=0, atol=1e-6)
