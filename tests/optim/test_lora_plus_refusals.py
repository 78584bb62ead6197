"""LoRA+ refuses ratios out of range, and whatever would undo or repeat its ratio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as S

from lightning_lora import LoRACallback, LoRAConfig, apply_lora
from lightning_lora.optim import apply_lora_plus, lora_param_groups
from lightning_lora.optim.lora_plus import check_kept
from tests.conftest import TinyModel
from tests.lit import LitNet
from tests.optim.lora_plus_runs import RATE, RATIO, checkpoint, fit

# Lightning's advice to resume with the same callbacks and folder, which these tests do otherwise on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory")


@pytest.mark.parametrize("ratio", [0, -1, float("nan"), float("inf"), "16", None])
def test_a_ratio_out_of_range_is_refused_where_it_is_given(ratio: Any) -> None:
    with pytest.raises(ValueError, match=r"lora_plus_ratio=.*: give a number > 0, such as 16"):
        LoRACallback(lora_plus_ratio=ratio)


def test_what_would_undo_or_repeat_the_ratio_is_refused(tmp_path: Path, make: Any) -> None:
    class Own(LitNet):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(lora_param_groups(self, lr=RATE, lora_plus_ratio=RATIO))
            return [optimizer], [self.schedule(optimizer)] if self.schedule else []

    with pytest.raises(
        ValueError, match=r"lora_plus_ratio=16: a scheduler gave B the rate 0\.0004 where A has 0\.0004\. Pass LoRACallback"
    ):
        fit(tmp_path, Own(schedule=lambda o: S.OneCycleLR(o, RATE, total_steps=20)), 1.0, 1)
    fit(tmp_path, Own(schedule=lambda o: S.OneCycleLR(o, [RATE, RATIO * RATE], total_steps=20)), 1.0, 1)
    with pytest.raises(ValueError, match="lora_plus_ratio=4: the optimizer's groups have a ratio already; give it once"):
        fit(tmp_path, Own(), 4, 1)
    model = apply_lora(make(TinyModel))
    with pytest.raises(ValueError, match="lora_plus_ratio=4: SGD holds no B of an adapter of TinyModel"):
        apply_lora_plus(torch.optim.SGD([torch.ones(1)], lr=RATE), model, 4)


def test_a_resume_with_another_ratio_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, LitNet(), RATIO, 1, checkpoint(tmp_path))
    with pytest.raises(ValueError, match="lora_plus_ratio is 16 in the checkpoint, 4 here; resume with the same"):
        fit(tmp_path, LitNet(), 4, 2, ckpt=tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"has 2 parameter groups, this one 1; build it as it was built then \(lora_plus_ratio"):
        fit(tmp_path, LitNet(), 1.0, 2, ckpt=tmp_path / "last.ckpt")


def test_a_scheduler_that_undoes_vera_s_ratio_is_refused(make: Any) -> None:
    model = apply_lora(make(TinyModel), config=LoRAConfig(variant="vera"))
    optimizer = torch.optim.AdamW(lora_param_groups(model, lr=RATE, lora_plus_ratio=RATIO))
    check_kept(optimizer)
    S.OneCycleLR(optimizer, RATE, total_steps=20)
    with pytest.raises(ValueError, match="a scheduler gave B the rate"):
        check_kept(optimizer)


class ByPosition:
    """A scheduler of another library: it sets rates by position, in methods of its own, one calling the other."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.base = optimizer, [group["lr"] for group in optimizer.param_groups]

    def step_update(self, number: int) -> None:
        self.write([rate / (1 + number) for rate in self.base])

    def write(self, values: list[float]) -> None:
        for group, value in zip(self.optimizer.param_groups, values, strict=True):
            group["lr"], group["momentum"] = value, 0.5

    def step(self, epoch: int) -> None:
        self.step_update(epoch)


@pytest.mark.parametrize("method", ["step", "step_update", "write"])
def test_whatever_method_of_a_scheduler_sets_the_rates(method: str) -> None:
    model = apply_lora(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), LoRAConfig(rank=2, target_modules=["0", "1"]))
    groups = [{"params": [p for p in layer.parameters() if p.requires_grad], "lr": lr} for layer, lr in zip(model, (1.0, 2.0), strict=True)]
    optimizer = torch.optim.SGD(groups)
    scheduler = ByPosition(optimizer)
    apply_lora_plus(optimizer, model, RATIO, scheduler)
    getattr(scheduler, method)([0.5, 1.0] if method == "write" else 1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 8.0, 1.0, 16.0]
    assert [group["momentum"] for group in optimizer.param_groups] == [0.5] * 4
    assert isinstance(scheduler, ByPosition) and vars(scheduler).keys() == {"optimizer", "base"}
