"""LoRA+, GaLore and ZeroRedundancyOptimizer on two processes, against one; their resume across the number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_lora import LoRACallback
from lightning_lora.optim import galore_optimizer, galore_param_groups, lora_param_groups
from tests.distributed.nets import CONFIG, adapter_tensors
from tests.distributed.runs import BATCHES, LitFSDP2, LitShared, model_parallel
from tests.distributed.test_lightning import start

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory", "ignore:The dirpath has changed"
)


@pytest.fixture(scope="module")
def lora_plus_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return start(None, "single", str(tmp_path_factory.mktemp("single")), 2, lora_plus_ratio=8)[0]


@pytest.mark.parametrize("name", ["ddp", "fsdp full", "fsdp2 full", "lora_fsdp2", "lora_fsdp2 pulled", "tp after"])
def test_lora_plus_trains_as_one_process_does(pool: Any, lora_plus_run: dict[str, Any], tmp_path: Path, name: str) -> None:
    for rank in start(pool, name, str(tmp_path), 2, lora_plus_ratio=8):
        assert rank["losses"] == pytest.approx(lora_plus_run["losses"], abs=1e-5)
        for key, adapter in lora_plus_run["adapters"].items():  # eight times the rate, eight times the rounding
            torch.testing.assert_close(rank["adapters"][key], adapter, rtol=0, atol=1e-5, msg=key)


class Projected:
    def configure_optimizers(self) -> Any:
        optimizer = galore_optimizer(galore_param_groups(self, lr=1e-2, rank=2, update_proj_gap=3, exclude_modules=["head"]))
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}


class LitGaLore(Projected, LitShared): ...


class LitShardedGaLore(Projected, LitFSDP2): ...


def fit(folder: str, epochs: int, ckpt: str | None = None, sharded: bool = False) -> dict[str, Any]:
    """Full-parameter training with GaLore, no LoRA; subspaces change at steps 3, 6, 9 …"""
    torch.manual_seed(7)
    module, parallel = (LitShardedGaLore() if sharded else LitGaLore()), dist.is_initialized()
    strategy = "auto" if not parallel else model_parallel() if sharded else DDPStrategy(process_group_backend="gloo")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size() if parallel else 1,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=[ModelCheckpoint(folder, filename="last", enable_version_counter=False)],
        default_root_dir=folder,
        **quiet,  # type: ignore[arg-type]
    )
    trainer.fit(module, ckpt_path=ckpt)
    return {"losses": module.losses, "weights": {name: p.detach().clone() for name, p in module.named_parameters()}}


def test_galore_under_ddp_is_one_process_and_resumes_on_one_and_on_two(pool: Any, tmp_path: Path) -> None:
    whole = fit(str(tmp_path / "whole"), 4)
    half = pool.run(fit, str(tmp_path / "half"), 2)
    last = str(tmp_path / "half" / "last.ckpt")
    for rank in [*pool.run(fit, str(tmp_path / "two"), 4, last), fit(str(tmp_path / "one"), 4, last)]:
        assert half[0]["losses"] + rank["losses"] == pytest.approx(whole["losses"], abs=1e-5)
        for name, weight in whole["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=0, atol=1e-5, msg=name)
    assert sum(whole["losses"][-BATCHES:]) < sum(whole["losses"][:BATCHES])


def test_galore_on_shards_is_refused_by_name(pool: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ValueError: net\.embed\.weight is sharded, .* train under DDP, or leave it out"):
        pool.run(fit, str(tmp_path), 1, None, True)


class LitDivided(LitShared):
    """Each process has the optimizer's state of some parameters; alone, the one process has all of it."""

    ratio = 1.0

    def configure_optimizers(self) -> Any:
        groups, settings = lora_param_groups(self, lr=1e-2, lora_plus_ratio=self.ratio), {"eps": 1e-3, "foreach": False}
        if dist.is_initialized():
            from torch.distributed.optim import ZeroRedundancyOptimizer  # torch warns of itself when this is imported

            optimizer: Any = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings)
        else:
            optimizer = torch.optim.AdamW(groups, **settings)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}


def fit_divided(folder: str, epochs: int, ckpt: str | None = None, ratio: float = 1.0, by_callback: float = 1.0) -> dict[str, Any]:
    torch.manual_seed(7)
    module, parallel = LitDivided(), dist.is_initialized()
    module.ratio = ratio
    trainer = L.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size() if parallel else 1,
        strategy=DDPStrategy(process_group_backend="gloo") if parallel else "auto",
        max_epochs=epochs,
        callbacks=[
            LoRACallback(CONFIG, merge_on_fit_end=False, lora_plus_ratio=by_callback),
            ModelCheckpoint(folder, filename="last", enable_version_counter=False),
        ],
        default_root_dir=folder,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=ckpt)
    return {"losses": module.losses, "adapters": adapter_tensors(module)}


@pytest.mark.parametrize("ratio", [1.0, 8.0])
def test_a_divided_optimizer_is_saved_whole_and_resumes_on_one_and_on_two(pool: Any, tmp_path: Path, ratio: float) -> None:
    whole = fit_divided(str(tmp_path / "whole"), 4, None, ratio)
    half = pool.run(fit_divided, str(tmp_path / "half"), 2, None, ratio)
    last = str(tmp_path / "half" / "last.ckpt")
    saved = torch.load(last)["optimizer_states"][0]
    assert saved["state"].keys() == half[0]["adapters"].keys() and all(set(each) >= {"exp_avg", "step"} for each in saved["state"].values())
    for rank in [*pool.run(fit_divided, str(tmp_path / "two"), 4, last, ratio), fit_divided(str(tmp_path / "one"), 4, last, ratio)]:
        assert half[0]["losses"] + rank["losses"] == pytest.approx(whole["losses"], abs=1e-5)
        for name, adapter in whole["adapters"].items():
            torch.testing.assert_close(rank["adapters"][name], adapter, rtol=0, atol=1e-5, msg=name)


def test_lora_plus_on_a_divided_optimizer_is_refused_by_name(pool: Any, tmp_path: Path) -> None:
    """Its groups can no longer be split: B would train at A's rate."""
    with pytest.raises(RuntimeError, match=r"lora_plus_ratio=8\.0: ZeroRedundancyOptimizer divided .*lora_param_groups\(model, lr="):
        pool.run(fit_divided, str(tmp_path), 1, None, 1.0, 8.0)
