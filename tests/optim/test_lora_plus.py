"""LoRA+: B's rate is λ times A's at every step, under every scheduler, by hand, after a resume; A's is what it would be without."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import lr_scheduler as S

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, get_lora_parameters
from lightning_lora.optim import apply_lora_plus, lora_param_groups
from tests.conftest import TinyModel, same_bits
from tests.lit import CONFIG, LitNet, trainer
from tests.optim.lora_plus_runs import RATE, RATIO, SCHEDULERS, Scheduled, checkpoint, fit
from tests.parity.models import DEPRECATED_BY_PEFT

# Lightning's advice to resume with the same callbacks and folder, which these tests do otherwise on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_ratio_holds_under_every_scheduler_and_after_a_resume(tmp_path: Path, name: str) -> None:
    plain, plus = Scheduled(SCHEDULERS[name]), Scheduled(SCHEDULERS[name])
    fit(tmp_path, plain, 1.0, 4)
    run = fit(tmp_path, plus, RATIO, 4)
    assert len({step["lora_A"][0] for step in plus.steps}) > 1 and len(plus.steps) == 16
    for without, step in zip(plain.steps, plus.steps, strict=True):
        assert step["lora_A"] == without["lora_A"]  # rate, momentum, decay: as the scheduler has them without LoRA+
        rate, *rest = step["lora_A"]
        assert step["lora_B"] == [rate * RATIO, *rest]
    groups = run.optimizers[0].param_groups  # after the last scheduler step: what a monitor reads
    assert [len(group["params"]) for group in groups] == [2, 2] and groups[1]["lr"] == RATIO * groups[0]["lr"]

    first, second = Scheduled(SCHEDULERS[name]), Scheduled(SCHEDULERS[name])
    fit(tmp_path, first, RATIO, 2, checkpoint(tmp_path))
    fit(tmp_path, second, RATIO, 4, ckpt=tmp_path / "last.ckpt")
    if not name.startswith("Plateau"):  # Lightning steps it after the checkpoint is written, with or without LoRA
        assert first.steps + second.steps == plus.steps
        for mine, theirs in zip(get_lora_parameters(second), get_lora_parameters(plus), strict=True):
            assert same_bits(mine, theirs)
    assert all(step["lora_B"][0] == RATIO * step["lora_A"][0] for step in second.steps)


def test_training_is_that_of_a_plain_loop_with_two_groups(tmp_path: Path) -> None:
    module = Scheduled(lambda o: S.StepLR(o, 1, gamma=0.7))
    fit(tmp_path, module, RATIO, 2)
    torch.manual_seed(5)
    net = apply_lora(LitNet().net, config=CONFIG)
    optimizer = torch.optim.AdamW(lora_param_groups(net, lr=RATE, weight_decay=0.1, lora_plus_ratio=RATIO))
    scheduler = S.StepLR(optimizer, 1, gamma=0.7)
    for _ in range(2):
        for x, y in LitNet().train_dataloader():
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    for (name, mine), (_, theirs) in zip(module.net.named_parameters(), net.named_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7, msg=name)


def test_rates_set_by_hand_keep_the_ratio(tmp_path: Path) -> None:
    class ByHand(Scheduled):  # Lightning's own recipe for a warm-up
        def optimizer_step(self, epoch: int, batch: int, optimizer: Any, closure: Any = None) -> None:
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 + self.trainer.global_step)
            optimizer.step(closure=closure)

    module = ByHand(lambda o: S.ConstantLR(o, 1.0))
    fit(tmp_path, module, RATIO, 1)
    assert [step["lora_A"][0] for step in module.steps] == pytest.approx([RATE * i for i in (1, 2, 3, 4)])
    assert all(step["lora_B"][0] == RATIO * step["lora_A"][0] for step in module.steps)


def test_the_users_groups_keep_their_settings_names_and_lists(tmp_path: Path) -> None:
    class Grouped(Scheduled):
        def configure_optimizers(self) -> Any:
            groups = [
                {"params": list(self.net.embed.named_parameters(prefix="e")), "name": "base", "lr": 5.0},
                {"params": list(self.net.fc1.named_parameters(prefix="1")), "name": "slow", "weight_decay": 0.0},
                {"params": list(self.net.fc2.named_parameters(prefix="2")), "name": "fast", "lr": 3 * RATE, "weight_decay": 0.2},
            ]
            optimizer = torch.optim.AdamW(groups, lr=RATE)
            rates = [5.0, RATE, 3 * RATE]
            return [optimizer], [{"scheduler": S.OneCycleLR(optimizer, rates, total_steps=9), "interval": "step"}]

    monitor = LearningRateMonitor()
    run = trainer(tmp_path, LoRACallback(CONFIG, lora_plus_ratio=4), monitor, max_epochs=2, log_every_n_steps=1)
    run.loggers = [CSVLogger(tmp_path)]
    run.fit(Grouped(None))
    groups = run.optimizers[0].param_groups
    assert [(g["name"], len(g["params"]), g["weight_decay"]) for g in groups] == [
        ("base", 0, 1e-2),
        ("slow", 1, 0.0),
        ("slow_lora_B", 1, 0.0),
        ("fast", 1, 0.2),
        ("fast_lora_B", 1, 0.2),
    ]
    assert [group["param_names"] for group in groups] == [[], ["1.lora_A"], ["1.lora_B"], ["2.lora_A"], ["2.lora_B"]]
    rates = [group["lr"] for group in groups]
    assert rates[2] == 4 * rates[1] and rates[4] == 4 * rates[3] and rates[3] == pytest.approx(3 * rates[1])
    assert len(monitor.lrs["lr-AdamW/slow"]) == 8
    assert monitor.lrs["lr-AdamW/slow_lora_B"] == [4 * rate for rate in monitor.lrs["lr-AdamW/slow"]]


@pytest.mark.filterwarnings("ignore:The lr scheduler dict contains the key")
def test_accumulation_and_manual_optimization(tmp_path: Path) -> None:
    class Manual(Scheduled):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.step(batch))
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()
                self.lr_schedulers().step()

    manual, accumulated = Manual(SCHEDULERS["Cyclic"]), Scheduled(SCHEDULERS["Cyclic"])
    fit(tmp_path, manual, RATIO, 2)
    torch.manual_seed(5)
    callback = LoRACallback(CONFIG, merge_on_fit_end=False, lora_plus_ratio=RATIO)
    trainer(tmp_path, callback, max_epochs=2, accumulate_grad_batches=2).fit(accumulated)
    assert len(manual.steps) == 4 and manual.steps == accumulated.steps
    assert all(step["lora_B"][0] == RATIO * step["lora_A"][0] for step in manual.steps)


def test_an_optimizer_that_counts_in_its_groups_counts_b_apart_and_tensor_rates_stay(make: Any, ids: torch.Tensor) -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["sum"] = group.get("sum", 0.0) + float(group["lr"])
            return super().step(closure)

    model = apply_lora(make(TinyModel))
    optimizer = Counting(get_lora_parameters(model), lr=torch.tensor(RATE), foreach=False)
    scheduler = S.ExponentialLR(optimizer, 0.5)
    apply_lora_plus(optimizer, model, 4, scheduler)
    assert isinstance(scheduler, S.ExponentialLR) and "step" not in scheduler.state_dict()
    rate = optimizer.param_groups[1]["lr"]
    for _ in range(3):
        model(ids).square().mean().backward()
        optimizer.step()
        scheduler.step()
    a, b = optimizer.param_groups
    assert float(a["sum"]) == pytest.approx(RATE * 1.75) and float(b["sum"]) == pytest.approx(4 * RATE * 1.75)
    assert b["lr"] is rate and float(rate) == pytest.approx(4 * RATE / 8)


def test_the_factor_that_starts_at_zero_is_b(make: Any, ids: torch.Tensor) -> None:
    model = apply_lora(make(TinyModel), config=LoRAConfig(target_modules=["embed", "mlp"]))
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(get_lora_parameters(model), lr=RATE)
    apply_lora_plus(optimizer, model, RATIO)
    model(ids).square().mean().backward()
    optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
        if p.requires_grad:
            zero = (name == "embed.lora_A") or (name != "embed.lora_B" and name.endswith("lora_B"))
            torch.testing.assert_close(old - p, RATE * (RATIO if zero else 1) * p.grad, msg=name)


@pytest.mark.filterwarnings(DEPRECATED_BY_PEFT)
@pytest.mark.parametrize(("variant", "number"), [("plain", 9), ("adalora", 13)])
def test_groups_are_pefts(make: Any, variant: str, number: int) -> None:
    """By name, rate and decay. PEFT gives vectors B's rate too and embeddings a fixed one; those two differ on purpose."""
    fields: dict[str, Any] = {"target_modules": ["q_proj", "mlp"], "modules_to_save": ["lm_head"]}
    ours = apply_lora(make(TinyModel), config=LoRAConfig(variant=variant, **fields))
    config = peft.LoraConfig(**fields) if variant == "plain" else peft.AdaLoraConfig(init_r=8, total_step=100, **fields)
    theirs = peft.get_peft_model(make(TinyModel), config)
    rates = {"lr": RATE, "loraplus_lr_ratio": RATIO, "loraplus_weight_decay": 0.3}
    there = create_loraplus_optimizer(theirs, torch.optim.AdamW, **rates)
    here = torch.optim.AdamW(lora_param_groups(ours, lr=RATE, weight_decay=0.3, lora_plus_ratio=RATIO))
    split = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=RATE, weight_decay=0.3)
    apply_lora_plus(split, ours, RATIO)

    def table(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
        groups = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
        names = {name.removeprefix("base_model.model."): groups[id(p)] for name, p in model.named_parameters() if id(p) in groups}
        named = {re.sub(r"\.modules_to_save\.default|\.default(\.weight)?$", "", name): v for name, v in names.items()}
        return {name: v for name, v in named.items() if not name.endswith("ranknum")}  # a constant that PEFT leaves to the optimizer

    assert len(table(ours, here)) == number
    assert table(ours, here) == table(theirs, there) == table(ours, split)


def rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    held = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    return {name: held[id(p)] for name, p in model.named_parameters() if id(p) in held}


@pytest.mark.parametrize("variant", ["plain", "dora", "lora_fa", "adalora", "vera"])
def test_both_ways_give_each_parameter_the_same_rate(make: Any, variant: str) -> None:
    """VeRA's b, a vector, starts at zero as B does. Vectors do not decay in ``lora_param_groups``."""
    model = apply_lora(make(TinyModel), config=LoRAConfig(variant=variant))
    groups = torch.optim.AdamW(lora_param_groups(model, lr=RATE, weight_decay=0.3, lora_plus_ratio=RATIO))
    split = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.3)
    apply_lora_plus(split, model, RATIO)
    here, there = rates(model, groups), rates(model, split)
    assert {name: rate for name, (rate, _) in here.items()} == {name: rate for name, (rate, _) in there.items()}
    assert {rate for rate, _ in here.values()} == {RATE, RATE * RATIO} if variant != "lora_fa" else {RATE * RATIO}
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    assert {name: decay for name, (_, decay) in here.items()} == {name: 0.3 * (shapes[name] > 1) for name in here}


@pytest.mark.parametrize("shared", [False, True])
def test_parts_have_ratios_of_their_own_in_one_optimizer(tmp_path: Path, shared: bool) -> None:
    class Parts(Scheduled):
        def configure_optimizers(self) -> Any:
            parts = [{"params": list(part.parameters()), "name": "both"} for part in ([self.net] if shared else [self.net.fc1])]
            parts += [] if shared else [{"params": list(self.net.fc2.parameters()), "name": "own", "lr": 3 * RATE}]
            optimizer = torch.optim.AdamW(parts, lr=RATE)
            optimizer.register_step_post_hook(lambda o, args, kwargs: self.seen.append(rates(self.net, o)))
            return [optimizer], [{"scheduler": S.CosineAnnealingLR(optimizer, 6, eta_min=RATE / 4), "interval": "step"}]

    config, ratios = LoRAConfig(rank=2, target_modules=["0"]), {"fc1": 16, "fc2": 4}
    callbacks = [LoRACallback(config, module=f"net.{n}", lora_plus_ratio=r, merge_on_fit_end=False) for n, r in ratios.items()]
    module = Parts(None)
    module.seen = []
    module.net.fc1, module.net.fc2 = nn.Sequential(module.net.fc1), nn.Sequential(module.net.fc2)
    run = trainer(tmp_path, *callbacks, LearningRateMonitor(), max_epochs=1)
    run.loggers = [CSVLogger(tmp_path)]
    run.fit(module)
    assert len(module.seen) == 4
    for seen in module.seen:
        for name, ratio in ratios.items():
            assert seen[f"{name}.0.lora_B"] == (ratio * seen[f"{name}.0.lora_A"][0], 1e-2)
    names = ["both", "both_lora_B_2", "both_lora_B"] if shared else ["both", "both_lora_B", "own", "own_lora_B"]
    assert [group["name"] for group in run.optimizers[0].param_groups] == names
    with pytest.raises(ValueError, match="have a ratio already; give it once"):
        apply_lora_plus(run.optimizers[0], module.net.fc2, 2)
