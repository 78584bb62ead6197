"""LoRACallback trains the adapters and nothing else, as a plain loop does; it merges at the end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import lr_scheduler as S

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, get_lora_parameters
from lightning_lora.layers import lora_layers
from tests.callbacks.lora_runs import SCHEDULES, checkpoint_in, fit
from tests.lit import CONFIG, LitNet, bits, make_net, trainer

# Lightning's advice to resume with the same callbacks and folder, which these tests do otherwise on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed", "ignore:Checkpoint directory"
)


# Training.


@pytest.mark.parametrize("late", [False, True], ids=["built in __init__", "built in configure_model"])
def test_trains_the_adapters_and_nothing_else(tmp_path: Path, late: bool) -> None:
    before = bits(make_net())
    module = LitNet(late)
    fit(tmp_path, module, lora=LoRACallback(CONFIG, merge_on_fit_end=False))
    after = bits(module.net)
    moved = {name for name in after if name not in before or not torch.equal(after[name], before[name])}
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert moved == statistics | {f"{fc}.{part}" for fc in ("fc1", "fc2") for part in ("lora_A", "lora_B")}
    assert module.losses[-1] < module.losses[0]


@pytest.mark.parametrize("late", [False, True])
def test_trains_as_a_plain_loop_does(tmp_path: Path, late: bool) -> None:
    torch.manual_seed(5)
    module = LitNet(late)
    fit(tmp_path, module, lora=LoRACallback(CONFIG, merge_on_fit_end=False))
    torch.manual_seed(5)
    net = apply_lora(make_net(), config=CONFIG)
    optimizer = torch.optim.AdamW(get_lora_parameters(net), lr=1e-2)
    for _ in range(2):
        for x, y in LitNet().train_dataloader():
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, mine), (_, theirs) in zip(module.net.named_parameters(), net.named_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=name)


def test_dropout_is_on_again_after_validation(tmp_path: Path) -> None:
    """Lightning puts modes back without calling ``train``."""
    seen = []

    class Note(LitNet):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.append([layer.dropout_now() for _, layer in lora_layers(self)])
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert [layer.dropout_now() for _, layer in lora_layers(self)] == [0.0, 0.0]

    config = LoRAConfig(rank=2, dropout=0.25, target_modules=["fc1", "fc2"])
    fit(tmp_path, Note(), lora=LoRACallback(config))
    assert seen == [[0.25, 0.25]] * 8


class Rates(L.Callback):
    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_run_as_without_lora_and_resume(tmp_path: Path, name: str) -> None:
    plain, with_lora = Rates(), Rates()
    trainer(tmp_path, plain, max_epochs=4).fit(LitNet(schedule=SCHEDULES[name]))
    run = fit(tmp_path, LitNet(schedule=SCHEDULES[name]), 4, callbacks=(with_lora,))
    assert with_lora.seen == plain.seen
    assert len({tuple(rates) for rates in plain.seen}) > 1
    held = [p for group in run.optimizers[0].param_groups for p in group["params"]]
    assert len(held) == 4 and all(p.requires_grad for p in held)

    # Resumed as Lightning resumes without LoRA (its Plateau scheduler steps after the checkpoint is written).
    plain, with_lora = Rates(), Rates()
    for kind, rates, lora in (("plain", plain, ()), ("lora", with_lora, (LoRACallback(CONFIG),))):
        trainer(tmp_path, *lora, checkpoint_in(tmp_path / kind), max_epochs=2).fit(LitNet(schedule=SCHEDULES[name]))
        run = trainer(tmp_path, *lora, rates, max_epochs=4)
        run.fit(LitNet(schedule=SCHEDULES[name]), ckpt_path=tmp_path / kind / "last.ckpt")
    assert with_lora.seen == plain.seen


def test_a_group_without_trainable_parameters_keeps_its_place(tmp_path: Path) -> None:
    class Grouped(LitNet):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net.embed.parameters(), "lr": 1.0}, {"params": self.net.fc1.parameters(), "lr": 1e-2}]
            groups.append({"params": list(self.net.fc2.named_parameters()), "lr": 1e-3})
            groups = [{**g, "params": [p[1] if isinstance(p, tuple) else p for p in g["params"]]} for g in groups]
            optimizer = torch.optim.AdamW(groups)
            return [optimizer], [S.LambdaLR(optimizer, [lambda e: 1.0, lambda e: 0.5**e, lambda e: 0.1**e])]

    run = fit(tmp_path, Grouped(), 2)
    groups = run.optimizers[0].param_groups
    assert [len(group["params"]) for group in groups] == [0, 2, 2]
    assert [group["lr"] for group in groups] == pytest.approx([1.0, 2.5e-3, 1e-5])


class TwoOptimizers(LitNet):
    """Manual optimization; the second optimizer's part is not adapted and trains in full."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer, loss in (
            (first, lambda: self.step(batch)),
            (second, lambda: self.critic(self.net(batch[0]).detach()).pow(2).mean()),
        ):
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.net.parameters(), lr=1e-2), torch.optim.SGD(self.critic.parameters(), lr=1e-2)]


def test_several_optimizers_and_manual_optimization_with_a_part_adapted(tmp_path: Path) -> None:
    module = TwoOptimizers()
    before = bits(module)
    run = fit(tmp_path, module, 1, lora=LoRACallback(CONFIG, module="net", merge_on_fit_end=False), callbacks=(checkpoint_in(tmp_path),))
    after = bits(module)
    assert not torch.equal(after["critic.weight"], before["critic.weight"])
    assert torch.equal(after["net.fc1.weight"], before["net.fc1.weight"])
    assert after["net.fc1.lora_B"].abs().sum() > 0
    assert [sum(len(g["params"]) for g in o.param_groups) for o in run.optimizers] == [4, 2]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert "critic.weight" in saved and "net.fc1.weight" not in saved

    again = TwoOptimizers()
    fit(tmp_path, again, 2, ckpt=tmp_path / "last.ckpt", lora=LoRACallback(CONFIG, module="net", merge_on_fit_end=False))
    whole = TwoOptimizers()
    torch.manual_seed(0)
    assert not torch.equal(bits(again)["net.fc1.lora_B"], after["net.fc1.lora_B"])
    assert whole is not again


def test_an_optimizer_with_nothing_to_train_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="LoRA freezes what has no adapter: critic"),  # all of it adapted
        pytest.raises(ValueError, match=r"optimizer 1 \(SGD\) holds no parameter that trains"),
    ):
        fit(tmp_path, TwoOptimizers(), 1)


def test_precision_plugins_keep_adapters_and_moments_in_fp32(tmp_path: Path) -> None:
    for precision, base in (("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32), ("64-true", torch.float64)):
        module = LitNet()
        run = fit(tmp_path, module, 1, precision=precision, lora=LoRACallback(CONFIG, merge_on_fit_end=False))
        wanted = torch.float64 if base == torch.float64 else torch.float32
        assert module.net.fc1.weight.dtype == base
        assert {p.dtype for p in get_lora_parameters(module)} == {wanted}
        assert {v.dtype for s in run.optimizers[0].state.values() for k, v in s.items() if k.startswith("exp")} == {wanted}


def test_bf16_true_resume_is_exact(tmp_path: Path) -> None:
    whole, first, second = LitNet(), LitNet(), LitNet()
    fit(tmp_path, whole, 2, precision="bf16-true")
    torch.manual_seed(0)
    for module, epochs, ckpt in ((first, 1, None), (second, 2, tmp_path / "last.ckpt")):
        fit(tmp_path, module, epochs, ckpt=ckpt, precision="bf16-true", callbacks=(checkpoint_in(tmp_path),))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert saved["net.fc1.lora_A"].dtype == torch.float32
    assert not torch.equal(saved["net.fc1.lora_A"], saved["net.fc1.lora_A"].bfloat16().float())


def test_what_trains_is_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("lightning.pytorch").propagate = True
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        fit(tmp_path, LitNet(), 1)
    assert "LoRA on 2 modules, 168 parameters" in caplog.text
    assert "trainable 168 of 1,020 parameters (16.47%)" in caplog.text
    assert "merged into 2 modules" in caplog.text


def test_compiled_modules_train_the_same(tmp_path: Path) -> None:
    plain, compiled = LitNet(), LitNet()
    compiled.net = torch.compile(compiled.net, backend="eager")  # type: ignore[assignment]
    for module in (plain, compiled):
        torch.manual_seed(2)
        fit(tmp_path, module, 1, lora=LoRACallback(CONFIG, merge_on_fit_end=False), callbacks=(checkpoint_in(tmp_path),))
    for mine, theirs in zip(get_lora_parameters(plain), get_lora_parameters(compiled), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not [name for name in torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"] if "_orig_mod" in name]


# Merging.


def test_merge_at_the_end_and_test_of_the_best_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = LitNet()
    best = ModelCheckpoint(tmp_path / "plain", monitor="val", mode="max", enable_version_counter=False)  # the worst: not the last
    run = fit(tmp_path, plain, 3, callbacks=(best,), lora=LoRACallback(CONFIG, merge_on_fit_end=False))
    wanted = run.test(plain, ckpt_path="best", verbose=False)

    torch.manual_seed(0)
    merged = LitNet()
    best = ModelCheckpoint(tmp_path / "merged", monitor="val", mode="max", enable_version_counter=False)
    run = fit(tmp_path, merged, 3, callbacks=(best,))
    assert all(layer.merged for _, layer in lora_layers(merged))
    assert not [name for name in merged.state_dict() if "lora_" in name]
    last = run.test(merged, verbose=False)
    assert run.test(merged, ckpt_path="best", verbose=False) == wanted != last
    assert run.predict(merged) and run.validate(merged, verbose=False)


def test_merged_predicts_as_unmerged(tmp_path: Path) -> None:
    results = []
    for merge in (False, True):
        torch.manual_seed(0)
        module = LitNet()
        run = fit(tmp_path, module, 2, lora=LoRACallback(CONFIG, merge_on_fit_end=merge))
        results.append(torch.cat(run.predict(module)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_fitting_again_unmerges_first(tmp_path: Path) -> None:
    module, base = LitNet(), make_net()
    fit(tmp_path, module, 1)
    assert not torch.equal(module.net.fc1.weight, base.fc1.weight)
    fit(tmp_path, module, 1, lora=LoRACallback(CONFIG, merge_on_fit_end=False))
    assert torch.equal(module.net.fc1.weight, base.fc1.weight)


def test_evaluation_before_fit_injects_once(tmp_path: Path) -> None:
    module = LitNet()
    run = trainer(tmp_path, LoRACallback(CONFIG), max_epochs=1)
    before = run.validate(module, verbose=False)
    first = dict(lora_layers(module))
    assert run.validate(module, verbose=False) == before
    run.fit(module)
    assert dict(lora_layers(module)) == first
