"""Modules built on the meta device: quantized, adapted and sharded there, then given their weights. Against one process that had them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch import Tensor

from tests.distributed.nets import fill_adapters, make_net
from tests.distributed.runs import run
from tests.distributed.test_quantized import worst

WAYS = [
    *(("lora_fsdp2", how) for how in (None, "fp8", "nf4")),
    *(("lora_fsdp2 pulled", how) for how in (None, "fp8", "nf4")),
    *(("ddp", how) for how in (None, "fp8", "nf4")),
    ("fsdp2 full", None),
    ("tp after", None),
]


class SameStart(L.Callback):
    """Adapters that do not depend on the strategy, unless a checkpoint is loaded after this."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        fill_adapters(pl_module)


def weights(name: str) -> Tensor:
    return make_net().state_dict()[name.removeprefix("net.")]


def fitted(name: str, folder: str, how: str | None, meta: bool = True, epochs: int = 2, ckpt: str | None = None) -> dict[str, Any]:
    options: dict[str, Any] = {"quantize": how, "weights": weights if meta else None, "more": () if ckpt else (SameStart(),)}
    return run(name, folder, epochs=epochs, ckpt=ckpt, save=ckpt is None, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], tuple[dict[str, Any], str]]:
    """What one process finds that had its weights from the start, and its checkpoint after half of the run."""

    @functools.cache
    def found(how: str | None) -> tuple[dict[str, Any], str]:
        folder = tmp_path_factory.mktemp("whole")
        fitted("single", str(folder / "first"), how, meta=False, epochs=1)
        return fitted("single", str(folder / "all"), how, meta=False), str(folder / "first" / "last.ckpt")

    return found


@pytest.mark.parametrize("name, how", WAYS)
def test_a_run_is_that_of_one_process(pool: Any, whole: Any, name: str, how: str | None, tmp_path: Path) -> None:
    """Losses, adapters, small checkpoints; a resume from what one process wrote."""
    alone, ckpt = whole(how)
    for rank in pool.run(fitted, name, str(tmp_path / "spread"), how):
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert worst(rank["adapters"], alone["adapters"]) < 1e-4
        assert all(".lora_" in saved for saved in rank["saved"]["names"])
    for rank in pool.run(fitted, name, str(tmp_path / "resumed"), how, True, 2, ckpt):
        assert worst(rank["adapters"], alone["adapters"]) < 1e-4
