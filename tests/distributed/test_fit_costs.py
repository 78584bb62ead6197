"""What ``fit`` adds to a step of ``lora_fsdp2``: collectives, and reads that make the process wait for its device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoRACallback
from lightning_lora.strategies import LoRAFSDP2Strategy
from tests.distributed.nets import CONFIG
from tests.distributed.runs import LitShared


class Lit(LitShared):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)  # AdamW reads its count of steps, on a CPU


class Costs(TorchDispatchMode):
    """Counts the collectives, and the values that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            self.found[str(func).split(".")[1]] += 1
        if func is torch.ops.aten._local_scalar_dense.default:
            self.found["reads"] += 1
        return func(*args, **(kwargs or {}))


class OneStep(L.Callback):
    """Counts from the start of the third batch to the start of the fourth."""

    def __init__(self) -> None:
        self.costs = Costs()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            self.costs.__enter__()
        if trainer.global_step == 3:
            self.costs.__exit__(None, None, None)


def costs(pull: bool, clip: float | None) -> dict[str, int]:
    one = OneStep()
    trainer = L.Trainer(
        accelerator="cpu", devices=dist.get_world_size(), max_epochs=2, callbacks=[one, LoRACallback(CONFIG, merge_on_fit_end=False)],
        strategy=LoRAFSDP2Strategy(process_group_backend="gloo", pull_frozen=pull), logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, use_distributed_sampler=False, gradient_clip_val=clip,
    )  # fmt: skip
    trainer.fit(Lit())
    return dict(one.costs.found)


FSDP2 = {"_allgather_base_": 5, "_reduce_scatter_base_": 2}  # three units forward, two blocks backward


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_adds_the_stop_flag_and_the_norm(pool: Any, clip: float | None) -> None:
    """The flag of an interruption is not waited for. A norm over pieces takes a sum."""
    for found in pool.run(costs, False, clip):
        assert found == {**FSDP2, "allreduce_": 1 + (clip is not None), "reads": 1}


def test_a_step_that_pulls_needs_no_sum_for_the_norm(pool: Any) -> None:
    for found in pool.run(costs, True, 1.0):
        assert found == {"allreduce_": 1 + 3, "reads": 1}  # two barriers and the gradients
