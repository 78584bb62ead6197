from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import lr_scheduler as S
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, get_lora_parameters, load_adapter, save_adapter
from lightning_lora.layers import lora_layers
from tests.faults.kit import row
from tests.lit import CONFIG, LitNet, bits, make_net, trainer

# Lightning's advice to resume with the same callbacks and folder, which these tests do otherwise on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed", "ignore:Checkpoint directory"
)


def checkpoint_in(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_last=True, enable_version_counter=False, **kwargs)


def fit(
    folder: Path, module: LitNet, epochs: int = 2, ckpt: Any = None, callbacks: tuple[L.Callback, ...] = (), **kwargs: Any
) -> L.Trainer:
    lora = kwargs.pop("lora", None) or LoRACallback(CONFIG)
    run = trainer(folder, lora, *callbacks, max_epochs=epochs, **kwargs)
    run.fit(module, ckpt_path=ckpt)
    return run


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


SCHEDULES = {
    "StepLR": lambda o: S.StepLR(o, 1, gamma=0.5),
    "LambdaLR": lambda o: S.LambdaLR(o, lambda step: 0.9**step),
    "Cosine": lambda o: S.CosineAnnealingLR(o, 6),
    "OneCycle": lambda o: {"scheduler": S.OneCycleLR(o, 1e-2, total_steps=20), "interval": "step"},
    "Cyclic": lambda o: {"scheduler": S.CyclicLR(o, 1e-3, 1e-2, step_size_up=3, cycle_momentum=False), "interval": "step"},
    "Plateau": lambda o: {"scheduler": S.ReduceLROnPlateau(o, patience=0, threshold=1e3), "monitor": "loss"},
    "Sequential": lambda o: {
        "scheduler": S.SequentialLR(o, [S.LinearLR(o, 0.1, 1.0, 2), S.CosineAnnealingLR(o, 5)], [2]),
        "interval": "step",
    },
}


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
        pytest.warns(UserWarning, match="LoRA freezes critic"),  # all of it adapted
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


# What must not go wrong in silence.


def test_an_optimizer_built_too_early_is_an_error(tmp_path: Path) -> None:
    class Early(LitNet):
        def __init__(self) -> None:
            super().__init__()
            self.early = torch.optim.AdamW(self.parameters(), lr=1e-2)

        def configure_optimizers(self) -> Any:
            return self.early

    with pytest.raises(ValueError, match=r"4 parameters that should train are in no optimizer: net\.fc1\.lora_A.*configure_optimizers"):
        fit(tmp_path, Early(), 1)


class Bypass(LitNet):
    def step(self, batch: Any) -> torch.Tensor:
        hidden = self.net.fc1(self.net.embed(batch[0])).relu()
        return nn.functional.cross_entropy(nn.functional.linear(hidden, self.net.fc2.weight), batch[1])


def test_an_adapter_without_a_gradient_is_an_error_unless_told_otherwise(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"1 of 2 adapted layers got no gradient in 4 batches: net\.fc2\. .*exclude_modules=\['net\.fc2'\]"
    ):
        fit(tmp_path, Bypass(), 1)
    fit(tmp_path, Bypass(), 1, lora=LoRACallback(CONFIG, check_gradients=False))


def test_every_adapter_has_a_gradient_after_the_first_backward(tmp_path: Path) -> None:
    class Look(L.Callback):
        missing: list[str] | None = None

        def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if self.missing is None:
                self.missing = [name for name, p in pl_module.named_parameters() if "lora_" in name and p.grad is None]

    look = Look()
    fit(tmp_path, LitNet(), 1, callbacks=(look,))
    assert look.missing == []


def test_a_wrong_submodule_name_lists_the_right_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="module='nett' is no submodule of LitNet; its children are net"):
        fit(tmp_path, LitNet(), 1, lora=LoRACallback(CONFIG, module="nett"))


@pytest.mark.parametrize("through", ["object", "memory"])
def test_tied_weights_are_refused_at_the_start_not_after_the_training(through: str, tmp_path: Path) -> None:
    module = LitNet()
    module.net.tied = nn.Linear(16, 32)
    if through == "object":
        module.net.tied.weight = module.net.fc1.weight
    else:
        module.net.tied.weight.data = module.net.fc1.weight.data
    with pytest.raises(ValueError, match=r"net\.fc1\.weight is tied to net\.tied\.weight.*merge_on_fit_end=False"):
        fit(tmp_path, module, 1)
    assert module.losses == []
    trainer(tmp_path, LoRACallback(CONFIG)).test(module, verbose=False)  # no merge is due there


@pytest.mark.filterwarnings("ignore:.*`LightningModule` that was compiled")
def test_the_module_stays_picklable_and_free_of_patches(tmp_path: Path) -> None:
    module = LitNet(late=True)
    fit(tmp_path, module, 1)
    assert "configure_model" not in module.__dict__
    x = torch.randn(4, 8)
    twin = pickle.loads(pickle.dumps(module.net))
    module.eval()
    torch.testing.assert_close(twin.eval()(x), module.net(x))
    assert copy.deepcopy(module.net).fc1.merged


# Checkpoints.


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_the_adapter_and_the_statistics_only(tmp_path: Path, weights_only: bool) -> None:
    run = fit(tmp_path, LitNet(), 1, callbacks=(checkpoint_in(tmp_path, save_weights_only=weights_only),))
    adapter = {f"net.{fc}.{part}" for fc in ("fc1", "fc2") for part in ("lora_A", "lora_B")}
    statistics = {"net.norm.running_mean", "net.norm.running_var", "net.norm.num_batches_tracked"}
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == adapter | statistics
    assert saved["lightning_lora"]["format_version"] == 1 and saved["lightning_lora"]["root"] == "net"
    assert ("optimizer_states" in saved) is not weights_only
    if not weights_only:
        assert set(saved["optimizer_states"][0]["state"]) == adapter
    # After the merge a save is still a resumable adapter checkpoint.
    run.save_checkpoint(tmp_path / "late.ckpt", weights_only=weights_only)
    late = torch.load(tmp_path / "late.ckpt", weights_only=True)
    assert set(late["state_dict"]) == adapter | statistics
    assert all(torch.equal(late["state_dict"][name], saved["state_dict"][name]) for name in adapter)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("merge", [False, True])
@row(33)
def test_resume_is_step_exact(tmp_path: Path, late: bool, merge: bool) -> None:
    def run(module: LitNet, folder: str, epochs: int, ckpt: Path | None = None) -> L.Trainer:
        torch.manual_seed(4)
        lora = LoRACallback(CONFIG, merge_on_fit_end=merge)
        return fit(tmp_path, module, epochs, ckpt, (checkpoint_in(tmp_path / folder),), lora=lora)

    whole, half, rest = (LitNet(late, SCHEDULES["Cosine"]) for _ in range(3))
    full = run(whole, "whole", 4)
    run(half, "half", 2)
    resumed = run(rest, "rest", 4, tmp_path / "half/last.ckpt")
    assert half.losses + rest.losses == whole.losses
    for name, tensor in bits(whole).items():
        assert torch.equal(tensor, bits(rest)[name]), name
    for mine, theirs in zip(full.optimizers[0].state.values(), resumed.optimizers[0].state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in ("exp_avg", "exp_avg_sq", "step"))


class Resumable(DataLoader):
    """A loader that Lightning can put back where it was."""

    position = 0

    def __iter__(self) -> Any:
        start = self.position % len(self)
        for self.position, batch in enumerate(super().__iter__(), start=1):
            if self.position > start:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def test_resume_in_the_middle_of_an_epoch_is_exact(tmp_path: Path) -> None:
    class Middle(LitNet):
        def train_dataloader(self) -> DataLoader:
            return Resumable(super().train_dataloader().dataset, batch_size=8)

    torch.manual_seed(4)
    whole, rest = Middle(), Middle()
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit(tmp_path, whole, 2, callbacks=(every,))
    fit(tmp_path, rest, 2, ckpt=tmp_path / "step=6.ckpt")
    assert rest.losses == whole.losses[6:]
    assert all(torch.equal(a, b) for a, b in zip(bits(whole).values(), bits(rest).values(), strict=True))


def test_resume_checks_config_base_and_kind_of_file(tmp_path: Path) -> None:
    fit(tmp_path, LitNet(), 1, callbacks=(checkpoint_in(tmp_path),))
    last = tmp_path / "last.ckpt"
    with pytest.raises(ValueError, match=r"another LoRA config .*alpha: 4\.0 != 8\.0"):
        fit(tmp_path, LitNet(), 2, ckpt=last, lora=LoRACallback(LoRAConfig(rank=2, alpha=8, target_modules=["fc1", "fc2"])))
    other = LitNet()
    other.net.embed.weight.data.mul_(2)
    with pytest.raises(ValueError, match="was trained on another base: fingerprint"):
        fit(tmp_path, other, 2, ckpt=last)
    fit(tmp_path, other, 2, ckpt=last, lora=LoRACallback(CONFIG, check_base=False))
    trainer(tmp_path, checkpoint_in(tmp_path / "full"), max_epochs=1).fit(LitNet())
    with pytest.raises(ValueError, match="was not written under LoRACallback"):
        fit(tmp_path, LitNet(), 2, ckpt=tmp_path / "full/last.ckpt")


def test_a_checkpoint_that_lacks_an_adapter_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, LitNet(), 1, callbacks=(checkpoint_in(tmp_path),))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del saved["state_dict"]["net.fc2.lora_B"]
    torch.save(saved, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"lacks 1 tensors that train here: net\.fc2\.lora_B"):
        fit(tmp_path, LitNet(), 2, ckpt=tmp_path / "last.ckpt")


def test_load_adapter_reads_a_checkpoint(tmp_path: Path) -> None:
    module = LitNet()
    fit(tmp_path, module, 1, callbacks=(checkpoint_in(tmp_path),), lora=LoRACallback(CONFIG, merge_on_fit_end=False))
    module.eval()
    x = torch.randn(4, 8)
    for fresh in (make_net(), LitNet()):  # into the network alone, or into a module around one
        load_adapter(fresh, tmp_path / "last.ckpt").eval()
        torch.testing.assert_close(getattr(fresh, "net", fresh)(x), module.net(x), rtol=0, atol=0)
    save_adapter(module, tmp_path / "folder")
    torch.testing.assert_close(load_adapter(make_net(), tmp_path / "folder").eval()(x), module.net(x), rtol=0, atol=0)


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


# Hugging Face models.


@pytest.fixture
def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3)
    return BertForSequenceClassification(config)


class LitBert(LitNet):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model  # type: ignore[assignment]

    def step(self, batch: Any) -> torch.Tensor:
        return self.net(input_ids=batch[0].abs().long().clamp(max=31), labels=batch[1] % 3).loss


def test_a_fresh_classification_head_trains_and_is_kept(tmp_path: Path, bert: nn.Module) -> None:
    config = LoRAConfig(rank=2, target_modules=["query", "value"])
    module = LitBert(bert)
    before = bits(module)
    lora = LoRACallback(config, merge_on_fit_end=False)
    fit(tmp_path, module, 1, callbacks=(checkpoint_in(tmp_path),), lora=lora)
    assert "trained in full: net.classifier" in str(lora.report)
    assert not torch.equal(module.net.classifier.weight, before["net.classifier.weight"])
    assert torch.equal(bits(module)["net.bert.pooler.dense.weight"], before["net.bert.pooler.dense.weight"])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {name for name in saved if "lora_" not in name} == {"net.classifier.weight", "net.classifier.bias"}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True, None])
def test_gradient_checkpointing(tmp_path: Path, bert: nn.Module, reentrant: bool | None) -> None:
    if reentrant is not None:
        bert.gradient_checkpointing_enable({"use_reentrant": reentrant})
    module = LitBert(bert)
    torch.manual_seed(1)
    fit(tmp_path, module, 1, lora=LoRACallback(LoRAConfig(rank=2, target_modules=["query", "value"]), merge_on_fit_end=False))
    assert module.net.bert.encoder.layer[0].attention.self.query.lora_B.abs().sum() > 0


# What LoRA freezes beside what it adapts.


class Distilled(LitNet):
    """A student that learns a frozen teacher's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = make_net().requires_grad_(False)

    def step(self, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), self.teacher(batch[0]) + 1)


def test_a_frozen_teacher_is_not_adapted(tmp_path: Path) -> None:
    module = Distilled()
    before = bits(module)
    with pytest.raises(ValueError, match=r"in 'teacher', which is frozen as a whole, and 'net.fc1', which trains: .*module='net'"):
        fit(tmp_path, module)
    assert all(torch.equal(value, before[name]) for name, value in bits(module).items())
    fit(tmp_path, module, lora=LoRACallback(CONFIG, module="net"))
    assert all(torch.equal(p, before[f"teacher.{name}"]) for name, p in module.teacher.named_parameters())


class Headed(LitNet):
    """A network that is adapted, a new head and a parameter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.temperature = nn.Linear(4, 4), nn.Parameter(torch.ones(()))

    def step(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.net(batch[0])) * self.temperature, batch[1])


def test_a_new_head_that_stays_random_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("lightning.pytorch").propagate = True
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"), pytest.warns(UserWarning, match="LoRA freezes"):
        fit(tmp_path, Headed(), 1)
    assert "frozen, without an adapter: temperature, head\n" in caplog.text


def test_a_new_head_that_stays_random_is_told_at_the_start(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def moved(module: Headed, **fields: Any) -> set[str]:
        before = bits(module)
        config = LoRAConfig(rank=2, alpha=4, target_modules=["fc1", "fc2"], **fields)
        fit(tmp_path, module, lora=LoRACallback(config, module=part, merge_on_fit_end=False))
        return {name.partition(".")[0] for name, value in bits(module).items() if name in before and not torch.equal(value, before[name])}

    part = None
    with pytest.warns(UserWarning, match=r"LoRA freezes temperature, head, which have no adapter: .*LoRACallback\(module=\.\.\.\)"):
        assert moved(Headed()) == {"net"}  # its running statistics
    with pytest.warns(UserWarning, match="LoRA freezes temperature, which"):
        assert moved(Headed(), modules_to_save=["head"]) == {"net", "head"}
    module = Headed()  # what is frozen already needs no word
    module.head.requires_grad_(False)
    module.temperature.requires_grad_(False)
    recwarn.clear()
    assert moved(module) == {"net"}
    assert moved(Headed(), modules_to_save=[]) == {"net"}
    part = "net"
    assert moved(Headed()) == {"net", "head", "temperature"}
    assert not [w for w in recwarn if "LoRA freezes" in str(w.message)]
