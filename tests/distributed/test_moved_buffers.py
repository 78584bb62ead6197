"""Buffers that training moves, under DDP and FSDP2: checkpoints and adapter folders have them, and a resume goes on with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_lora import load_adapter, save_adapter
from tests.distributed import runs
from tests.distributed.nets import Net, make_data, make_net
from tests.distributed.runs import LitShared, run


class Moving(Net):
    """Normalises its inputs by running statistics, and shifts them by a codebook's mean that follows them."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.codes.lerp_(x[: len(self.codes)], 0.1)
            self.count += 1
        return super().forward(self.norm(x) + self.codes.mean(0))


class LitMoving(LitShared):
    def __init__(self) -> None:
        super().__init__()
        self.net = moving()


def moving() -> Any:
    net = make_net()
    net.__class__ = Moving
    net.norm = nn.BatchNorm1d(8)
    net.register_buffer("codes", torch.zeros(3, 8))
    net.register_buffer("count", torch.tensor(0))
    return net


class Keep(L.Callback):
    """Save the adapter at the end, and keep what this process has then."""

    def __init__(self, folder: str) -> None:
        self.folder, self.buffers = folder, {}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        save_adapter(pl_module, self.folder, overwrite=True)
        self.buffers = {name: buffer.clone() for name, buffer in pl_module.net.named_buffers()}
        with torch.no_grad():
            self.output = pl_module.net.eval()(make_data()[0])


def moved(name: str, folder: str, epochs: int, ckpt: str | None = None) -> Any:
    strategy, _ = runs.STRATEGIES[name]
    keep = Keep(folder + "/adapter")
    with patch.dict(runs.STRATEGIES, {name: (strategy, LitMoving)}):
        run(name, folder, epochs=epochs, save=True, ckpt=ckpt, more=(keep,))
    return keep.buffers, keep.output


@pytest.mark.parametrize("name", ["ddp", "lora_fsdp2"])
def test_folder_and_resume_have_them(pool: Any, tmp_path: Path, name: str) -> None:
    whole = pool.run(moved, name, str(tmp_path / "whole"), 2)[0][0]
    buffers, output = pool.run(moved, name, str(tmp_path / "cut"), 1)[0]
    assert buffers["codes"].any() and buffers["count"] == 2
    for source in ("adapter", "last.ckpt"):
        loaded = load_adapter(moving() if source == "adapter" else LitMoving(), tmp_path / "cut" / source)
        net = loaded if source == "adapter" else loaded.net
        assert all(torch.equal(buffer, buffers[key]) for key, buffer in net.named_buffers())
        torch.testing.assert_close(net.eval()(make_data()[0]), output)
    resumed = pool.run(moved, name, str(tmp_path / "cut"), 2, str(tmp_path / "cut" / "last.ckpt"))[0][0]
    assert all(torch.equal(resumed[key], buffer) for key, buffer in whole.items())
