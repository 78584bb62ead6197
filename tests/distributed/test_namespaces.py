"""Several processes under ``pytorch_lightning``: to the bit what ``lightning.pytorch`` does."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.distributed import runs

NAMES = ["ddp", "fsdp sharded", "fsdp2 DCP", "lora_fsdp2"]


def test_trains_saves_resumes_and_merges_alike(pool: Any, tmp_path: Path) -> None:
    for rank in pool.run(under_both, str(tmp_path)):
        for name, (mine, expected) in rank.items():
            assert mine.keys() == expected.keys(), name
            for field in mine.keys() - {"adapters", "moments", "base"}:
                assert mine[field] == expected[field], (name, field)
            for field in ("adapters", "moments", "base"):
                assert mine[field].keys() == expected[field].keys() and mine[field]
                assert all(torch.equal(mine[field][key], expected[field][key]) for key in mine[field]), (name, field)
            assert mine["merged"] and all("lora_" in key for key in mine["saved"]["names"])


def under_both(folder: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Two epochs under ``lightning.pytorch``, and under the other package two runs of one, the second resumed; by strategy."""
    found = {}
    for name in NAMES:
        expected = runs.run(name, f"{folder}/{name}", 2, save=True, merge=True)
        with other_package():
            half = runs.run(name, f"{folder}/half {name}", 1, save=True)
            mine = runs.run(name, f"{folder}/whole {name}", 2, ckpt=f"{folder}/half {name}/last.ckpt", save=True, merge=True)
        found[name] = ({**mine, "losses": half["losses"] + mine["losses"]}, expected)
    return found


def other_package() -> ExitStack:
    """Let ``runs`` take everything of Lightning's from ``pytorch_lightning``."""
    import pytorch_lightning as pl  # here: the other tests' workers do without

    def over(cls: type) -> type:
        """The class over the other package's LightningModule."""

        def build(self: Any) -> None:
            pl.LightningModule.__init__(self)
            self.net, self.losses = runs.make_net(), []

        body = {**vars(runs.LitShared), **vars(cls), "__init__": build}
        return type(cls.__name__, (pl.LightningModule,), {key: body[key] for key in body if key not in ("__dict__", "__weakref__")})

    fsdp = type("CPUFSDPStrategy", (pl.strategies.FSDPStrategy,), {"_setup_model": runs.CPUFSDPStrategy._setup_model})
    swapped: dict[str, Any] = {name: getattr(pl.strategies, name) for name in ("DDPStrategy", "ModelParallelStrategy")}
    swapped |= {"L": pl, "ModelCheckpoint": pl.callbacks.ModelCheckpoint, "CPUFSDPStrategy": fsdp}
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    patched = ExitStack()
    patched.enter_context(patch.multiple(runs, **swapped))
    made: dict[str, Any] = {name: (strategy, over(cls)) for name, (strategy, cls) in runs.STRATEGIES.items() if isinstance(cls, type)}
    made["lora_fsdp2"] = ("lora_fsdp2".lower, over(runs.LitShared))  # by its name: `LoRACallback` makes it known
    patched.enter_context(patch.dict(runs.STRATEGIES, made))
    return patched
