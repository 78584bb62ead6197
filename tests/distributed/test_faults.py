"""Several processes: who writes, and what becomes of the others when one dies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lightning_lora import export_merged, save_adapter
from tests.distributed.pool import Pool
from tests.distributed.runs import run
from tests.distributed.wrappers import wrapped_and_adapted
from tests.faults.kit import row


def written(name: str, folder: str) -> list[str]:
    """The names of the files that this rank put in place while it saved an adapter, an export and a checkpoint."""
    found: list[str] = []
    replace = os.replace

    def spy(source: Any, target: Any) -> None:
        found.append(Path(target).name)
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", spy)
        save_adapter(wrapped_and_adapted(name, "before")[0], Path(folder, "adapter"))
        export_merged(wrapped_and_adapted(name, "before")[0], Path(folder, "export"))
        run({"fsdp1": "fsdp full", "fsdp2": "fsdp2 full"}.get(name, name), f"{folder}/run", 1, save=True)
    return sorted(found)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
@row(45)
def test_only_the_first_rank_writes(pool: Any, tmp_path: Path, name: str) -> None:
    first, second = pool.run(written, name, str(tmp_path))
    assert {"adapter_config.json", "adapter_model.safetensors", "last.ckpt"} <= set(first)
    assert second == []


def dies_in_a_save(name: str, folder: str) -> str:
    """The second rank is gone in the middle; what the first one gets."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError) as caught:
        if dist.get_rank() == 1:
            patch.setattr("lightning_lora.strategies.strategy_hooks.on_first_rank", lambda action: os._exit(9))
        run(name, folder, 1, save=True)
    return str(caught.value)


@row(44)
def test_a_rank_that_dies_in_a_save(tmp_path: Path) -> None:
    """The other ends with an error within seconds."""
    workers = Pool(2)
    try:
        workers.run(len, "")  # start them
        for _, pipe in workers.workers:
            pipe.send((dies_in_a_save, ("ddp", str(tmp_path))))
        (_, first), (dead, _) = workers.workers
        assert first.poll(60), "it hangs"
        ok, said = first.recv()
        assert ok, said
        dead.join(10)
        assert dead.exitcode == 9
    finally:
        workers.close()
