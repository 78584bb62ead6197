"""AdaLoRA on two processes: scores, masks and adapters of a single one, the same on every rank; resume; what is left after fit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_lora import AdaLoRACallback, LoRAConfig, load_adapter, shrink_adalora
from lightning_lora.layers import lora_layers
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.sharding import full_tensor
from tests.distributed.nets import CONFIG, adapter_tensors, make_net
from tests.distributed.runs import STRATEGIES

PLAN = {"target_rank": 2, "init_rank": 4, "tinit": 2, "tfinal": 3, "deltaT": 2}
SHARDED = ["fsdp2 full", "lora_fsdp2", "tp", "tp after"]
WHOLE = ["ddp", "fsdp full", "fsdp2 after", "lora_fsdp2 pulled"]

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory", "ignore:The dirpath")


class Trained(Callback):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.adapters = adapter_tensors(pl_module)
        callback = next(c for c in trainer.callbacks if isinstance(c, AdaLoRACallback))
        self.state = callback.allocator.state_dict()


def train(name: str, folder: str, ckpt: str | None = None, merge: bool = False, **kwargs: Any) -> dict[str, Any]:
    """Fit under a strategy; what was trained, whole, and what was left."""
    if dist.is_initialized():
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    strategy, make = STRATEGIES[name]
    torch.manual_seed(7)
    module, trained = make(), Trained()
    # Adam makes much of gradients that are rounding noise, and E = 0 leaves A and B only those at the start.
    module.configure_optimizers = lambda: torch.optim.AdamW(  # type: ignore[method-assign]
        [p for p in module.parameters() if p.requires_grad], lr=1e-2, eps=1e-4, foreach=False
    )
    config = LoRAConfig(alpha=8, target_modules=CONFIG.target_modules)
    callback = AdaLoRACallback(config, **PLAN, merge_on_fit_end=merge)
    checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size() if dist.is_initialized() else 1,
        strategy=strategy(),
        max_epochs=3,
        callbacks=[callback, trained, checkpoint],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **kwargs,
    )
    trainer.fit(module, ckpt_path=ckpt)
    return {
        "losses": module.losses,
        "adapters": trained.adapters,
        "state": trained.state,
        "ranks": callback.ranks,
        "left": {clean_name(name): tuple(full_tensor(layer.lora_A).shape) for name, layer in lora_layers(module)},
        "merged": all(layer.merged for _, layer in lora_layers(module)),
    }


def run(pool: Any, name: str, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    return pool.run(call, name, args, kwargs)


def call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return train(name, *args, **kwargs)


def equal(mine: dict[str, Any], theirs: dict[str, Any], atol: float) -> None:
    torch.testing.assert_close(mine["adapters"], theirs["adapters"], rtol=0, atol=atol)
    for key in ("sensitivity", "uncertainty"):
        torch.testing.assert_close(mine["state"][key], theirs["state"][key], rtol=0, atol=atol)
    assert mine["state"]["step"] == theirs["state"]["step"]
    masks = [{name: keep.tolist() for name, keep in each["state"]["keep"].items()} for each in (mine, theirs)]
    assert masks[0] == masks[1] and masks[0]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("single")
    return folder, train("single", str(folder))


@pytest.fixture(scope="module")
def parallel(pool: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """Runs under each strategy, a result a rank, with the checkpoints that they left."""
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in WHOLE + SHARDED}
    return {name: (folder, run(pool, name, str(folder))) for name, folder in folders.items()}


@pytest.mark.parametrize("name", WHOLE + SHARDED)
def test_trains_as_one_process_does(parallel: Any, single: Any, name: str) -> None:
    _, alone = single
    _, ranks = parallel[name]
    for result in ranks:
        equal(result, alone, 2e-6)
        assert result["losses"] == pytest.approx(alone["losses"], abs=2e-6)
        if name in SHARDED:  # they keep their size
            assert not result["ranks"] and all(shape[0] == 4 for shape in result["left"].values())
        else:
            assert result["ranks"] == alone["ranks"] and result["left"] == alone["left"]
    equal(ranks[0], ranks[1], 0.0)


@pytest.mark.parametrize(
    ("source", "target"), [("single", "ddp"), ("ddp", "fsdp2 full"), ("fsdp2 full", "single"), ("single", "fsdp full")]
)
def test_resumes_under_another_strategy(pool: Any, parallel: Any, single: Any, tmp_path: Path, source: str, target: str) -> None:
    folder, _ = single if source == "single" else parallel[source]
    start = (target, str(tmp_path), str(folder / "epoch=0.ckpt"))  # four of twelve steps: it prunes
    for result in [train(*start)] if target == "single" else run(pool, *start):
        equal(result, single[1], 2e-6)


@pytest.mark.parametrize("name", SHARDED)
def test_what_was_sharded_shrinks_on_one_process(parallel: Any, single: Any, name: str) -> None:
    model = load_adapter(make_net(), parallel[name][0] / "epoch=2.ckpt")
    assert {f"net.{module}": rank for module, rank in shrink_adalora(model).items()} == single[1]["ranks"]


@pytest.mark.parametrize("name", ["ddp", "fsdp full", "fsdp2 full"])
def test_merges_at_the_end(pool: Any, tmp_path: Path, name: str) -> None:
    assert all(result["merged"] for result in run(pool, name, str(tmp_path), merge=True))
