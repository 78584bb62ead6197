"""The adapter folder that a run of the command line leaves, under every strategy: one, and the adapter of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import load_adapter
from lightning_lora.cli.run_results import RunResults
from tests.distributed.nets import adapter_tensors, make_net
from tests.distributed.runs import STRATEGIES, run


def leave(name: str, folder: str, merge: bool) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The folders, and the adapter in the model's memory."""
    results = RunResults()
    adapters = run(name, folder, epochs=1, merge=merge, more=(results,))["adapters"]
    return [str(path) for path in results.adapters], adapters


@pytest.mark.parametrize("merge", [False, True], ids=["kept", "merged"])
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "single"])
def test_a_run_leaves_its_adapter(pool: Any, tmp_path: Path, name: str, merge: bool) -> None:
    left = pool.run(leave, name, str(tmp_path), merge)
    assert [folders for folders, _ in left] == [[str(tmp_path / "adapter")]] * 2
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    read = adapter_tensors(load_adapter(make_net(), tmp_path / "adapter"))
    mine = {key.removeprefix("net."): tensor for key, tensor in left[0][1].items()}
    assert read.keys() == mine.keys() and all(torch.equal(read[key], mine[key]) for key in mine)
