"""NaN on one rank stops the training of all, and no checkpoint is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora.layers import lora_layers
from lightning_lora.utils.sharding import local_tensor
from tests.distributed.runs import run


class Spoils(L.Callback):
    """Puts NaN into what the last rank has of one adapter, after the second batch."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == 1 and dist.get_rank() == dist.get_world_size() - 1:
            _, layer = next(iter(lora_layers(module)))
            with torch.no_grad():
                local_tensor(layer.lora_B.detach()).fill_(float("nan"))


def spoilt(name: str, folder: str, save: bool) -> str:
    saving = [ModelCheckpoint(folder, filename="c", every_n_train_steps=1, enable_version_counter=False)] if save else []
    with pytest.raises(RuntimeError, match="training stops and writes no checkpoint") as caught:
        run(name, folder, 2, more=(Spoils(), *saving), log_every_n_steps=50 if save else 2)
    return str(caught.value)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("name", ["ddp", "lora_fsdp2", "fsdp2 DCP"])
def test_nan_on_one_rank_stops_all(pool: Any, tmp_path: Path, name: str, save: bool) -> None:
    said = pool.run(spoilt, name, str(tmp_path), save)
    assert ("lora_B holds NaN" if save else "holds NaN") in said[-1] and all(text.startswith("training stops") for text in said)
    assert not save or os.listdir(tmp_path) == ["c.ckpt"]
