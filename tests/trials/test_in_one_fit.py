"""``LoRACallback(sweep=Trials([...]))``: each trial of one ``fit`` is what a fit of its own is."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping

from lightning_lora import LoRACallback, LoRAConfig, Trials, get_lora_parameters, quantize_base
from lightning_lora.data import InstructionDataModule
from lightning_lora.tasks import CausalLMTask
from tests import tiny_lm
from tests.trials.lit import CONFIG, GIVEN, QUIET, STOPPING, Lit, alone, fit, loaders, same
from tests.trials.nets import Rows

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*in your `training_step`")


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}])
def test_each_trial_is_what_its_own_fit_is(options):
    module, trials = Lit(), Trials(GIVEN)
    trainer = fit(module, LoRACallback(CONFIG, sweep=trials), **options)
    bases = {id(p) for p in module.parameters()}
    for given, (name, mine) in zip(GIVEN, trials.modules.items(), strict=True):
        other, theirs = alone(given, **options)
        same(mine, other)
        logged = {key.removeprefix(f"{name}/"): value for key, value in trainer.callback_metrics.items() if key.startswith(f"{name}/")}
        assert logged.keys() == theirs.callback_metrics.keys() and {"val_accuracy", "val_worst", "kept", "train_loss_epoch"} < logged.keys()
        for key, value in logged.items():
            assert float(value) == pytest.approx(float(theirs.callback_metrics[key]), rel=1e-9), key
        trained = {name for name, p in other.named_parameters() if p.requires_grad}
        assert {id(p) in bases for name, p in mine.named_parameters() if name not in trained} == {True}, "one base"
        assert {id(p) in bases for name, p in mine.named_parameters() if name in trained} == {False}
    assert list(trials.modules) == ["rank2", "small", "rank3-seed5-lora_plus_ratio4.0-dropout0.0", list(trials.modules)[3]]
    assert trainer.global_step == (9 if not options else 6) and trainer.lightning_module is module
    assert all(p.requires_grad for p in module.parameters()) and not get_lora_parameters(module), "the module is as it was"
    assert [type(c) for c in trainer.callbacks if not type(c).__module__.startswith("lightning.")] == [LoRACallback]
    assert [each.status for each in trials.result.outcomes] == ["complete"] * 4 and trials.result.outcomes[0].monitor == "val_loss"
    assert trials.result.best is min(trials.result.outcomes, key=lambda each: each.best) and "small" in str(trials.result)


class Hooked(Lit):
    """Logs rates that it takes from the Trainer, sees the loss of the backward pass, and changes batches while it trains."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.register_buffer("shift", torch.full((6,), 0.1, dtype=torch.float64))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "pixel_values": batch["pixel_values"] * 1.5 + self.shift} if self.training else batch

    def on_before_backward(self, loss: Any) -> None:
        self.log("backward", loss.detach())
        self.log("rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log("next_rate", self.trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0])


class Copies(Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.copy = copy.deepcopy(pl_module)


def test_what_a_module_takes_from_its_trainer_is_its_trials():
    trials, options, copies = Trials(GIVEN[:2]), {"accumulate_grad_batches": 2}, Copies()
    module = Hooked()
    trainer = fit(module, LoRACallback(CONFIG, sweep=trials), copies, **options)
    for given, (name, mine) in zip(GIVEN, trials.modules.items(), strict=False):
        other, theirs = alone(given, make=Hooked, **options)
        same(mine, other)
        for key, value in theirs.callback_metrics.items():
            assert float(trainer.callback_metrics[f"{name}/{key}"]) == pytest.approx(float(value), rel=1e-9), key
        validator = L.Trainer(enable_checkpointing=False, **QUIET)
        assert validator.validate(mine, loaders()[1], verbose=False) == validator.validate(other, loaders()[1], verbose=False)
    copied = {id(p) for p in copies.copy.parameters()}
    assert len(copied) > len(list(module.parameters())) and not copied & {id(p) for p in module.parameters()}


class HardCoded(Lit):
    """Its rate is nobody's attribute."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.hparams.clear()
        self.rate = given.get("learning_rate", 0.05)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05 if isinstance(self.trainer, L.Trainer) is False else self.rate, momentum=0.9)


def test_a_rate_reaches_a_module_that_has_none():
    given = [{"learning_rate": 0.2}, {"learning_rate": 0.01}]
    trials = Trials(given)
    fit(HardCoded(), LoRACallback(CONFIG, sweep=trials))
    for each, mine in zip(given, trials.modules.values(), strict=True):
        same(mine, alone(each, make=HardCoded)[0])


class OneCycle(Lit):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=20)]


class Groups(Lit):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([{"params": self.model.parameters(), "lr": 0.1}], lr=1.0)


class Plateau(Lit):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class LBFGS(Lit):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Nothing(Lit):
    def configure_optimizers(self) -> Any:
        return None


class InPlace(Lit):
    def loss(self, batch: dict[str, Any]) -> Any:
        batch["pixel_values"] += 1
        return super().loss(batch)


def without_rates(cls: type[Lit]) -> Lit:
    module = cls()
    module.hparams.clear()
    return module


@pytest.mark.parametrize(
    ("module", "error", "says"),
    [
        (without_rates(OneCycle), ValueError, "made groups without learning_rate=0.02.*read it from self.learning_rate there"),
        (without_rates(Groups), ValueError, "gives groups a lr of their own.*read it from self.learning_rate"),
        (OneCycle(), ValueError, "trial 'learning_rate0.02': configure_optimizers of OneCycle made groups without learning_rate"),
        (without_rates(Plateau), ValueError, "ReduceLROnPlateau looks at a metric"),
        (without_rates(LBFGS), ValueError, "LBFGS computes the loss several times"),
        (Nothing(), ValueError, "configure_optimizers returned no optimizer"),
        (InPlace(), RuntimeError, "changes a tensor of its batch in place"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*OneCycleLR", "ignore:.*returned .None")
def test_what_shows_later_leaves_trainer_and_module_as_they_were(module, error, says):
    callback, flags = LoRACallback(CONFIG, sweep=Trials([{"learning_rate": 0.02}])), [p.requires_grad for p in module.parameters()]
    trainer = L.Trainer(max_epochs=1, callbacks=[callback], enable_checkpointing=False, **QUIET)
    with pytest.raises(error, match=says):
        trainer.fit(module, *loaders())
    assert trainer.lightning_module is module and callback in trainer.callbacks and not get_lora_parameters(module)
    assert [p.requires_grad for p in module.parameters()] == flags and not hasattr(trainer.strategy, "_lora_hooks")
    assert sum(isinstance(each, LoRACallback) for each in trainer.callbacks) == 1


def test_a_trial_stops_early_alone():
    trials, stop = Trials(STOPPING), EarlyStopping("val_loss", patience=1)
    trainer = fit(Lit(), LoRACallback(CONFIG, sweep=trials), stop, max_epochs=6)
    steps = []
    for given, mine in zip(STOPPING, trials.modules.values(), strict=True):
        other, theirs = alone(given, EarlyStopping("val_loss", patience=1), max_epochs=6)
        same(mine, other)
        steps.append(theirs.global_step)
        assert mine.steps == other.steps, "a stopped trial costs nothing"
    assert [each.steps for each in trials.result.outcomes] == steps and steps[1] < steps[0] == trainer.global_step
    assert [each.status for each in trials.result.outcomes] == ["complete", "complete"]
    assert stop in trainer.callbacks and stop.wait_count == 0, "the user's is not used"


class Epochs(Lit):
    """Logs at the end of an epoch of training."""

    def on_train_epoch_end(self) -> None:
        self.log("steps", float(self.steps))


def test_a_trial_that_stops_inside_an_epoch_ends_it():
    trials, options = Trials(STOPPING), {"val_check_interval": 2, "max_epochs": 6}
    trainer = fit(Epochs(), LoRACallback(CONFIG, sweep=trials), EarlyStopping("val_loss", patience=1), **options)
    for given, (name, mine) in zip(STOPPING, trials.modules.items(), strict=True):
        other, theirs = alone(given, EarlyStopping("val_loss", patience=1), make=Epochs, **options)
        same(mine, other)
        assert trainer.callback_metrics[f"{name}/steps"] == theirs.callback_metrics["steps"] == mine.steps
    assert trials.result.outcomes[1].steps % 3 != 0, "inside an epoch"


def test_a_monitor_that_is_not_logged_is_named():
    with pytest.warns(UserWarning, match="monitor='val_lss' was not logged; there are train_loss"):
        fit(Lit(), LoRACallback(CONFIG, sweep=Trials([{"rank": 2}], monitor="val_lss")), max_epochs=1)


def test_the_fit_ends_when_all_have_stopped():
    trials = Trials([STOPPING[1], {**STOPPING[1], "name": "too", "rank": 1}])
    trainer = fit(Lit(), LoRACallback(CONFIG, sweep=trials), EarlyStopping("val_loss", patience=1), max_epochs=50)
    assert trainer.global_step == max(each.steps for each in trials.result.outcomes) < 50


class Blowing(Lit):
    """A rate of 7 blows up in the fourth step, one of 8 in the first."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        blows = (self.hparams["learning_rate"], self.steps) in ((7, 4), (8, 1))
        return {**output, "loss": output["loss"] * (float("nan") if blows else 1)}


def test_a_trial_that_is_not_finite_leaves_the_others(tmp_path):
    trials = Trials([{"rank": 2}, {"learning_rate": 7.0, "name": "hot"}, {"learning_rate": 8.0}], folder=tmp_path / "sweep")
    fit(Blowing(), LoRACallback(CONFIG, sweep=trials))
    good, bad, worse = trials.result.outcomes
    assert (
        worse.status == "failed"
        and (good.status, bad.status, trials.result.best) == ("complete", "failed", good)
        and "not finite at step 3" in bad.error
    )
    assert all(p.isfinite().all() for p in trials.modules["hot"].parameters())
    same(trials.modules["rank2"], alone(GIVEN[0], make=Blowing)[0])
    with pytest.raises(RuntimeError, match="every trial failed; the first: its loss or a gradient"):
        fit(Blowing(), LoRACallback(CONFIG, sweep=Trials([{"learning_rate": 7.0}])))


class Packed(Lit):
    def __init__(self, learning_rate: float = 0.05) -> None:
        super().__init__(learning_rate)
        self.model = quantize_base(self.model.float(), "fp8", modules_to_save=["6"])

    def loss(self, batch: dict[str, Any]) -> Any:
        return super().loss({**batch, "pixel_values": batch["pixel_values"].float()})


def test_a_packed_base_is_shared_too():
    module, trials = Packed(), Trials([{"rank": 1}, {"rank": 2}])
    module.rows = Rows()
    fit(module, LoRACallback(CONFIG, sweep=trials), max_epochs=1)
    base = {t.data_ptr() for t in (*module.parameters(), *module.model[0].buffers())}
    for mine in trials.modules.values():
        layer = mine.model[0]
        frozen = [t for name, t in (*layer.named_parameters(), *layer.named_buffers()) if "lora_" not in name]
        assert frozen and {t.data_ptr() for t in frozen} <= base and mine.rows is module.rows


def test_a_task_that_builds_its_model_in_setup(tmp_path):
    model = tiny_lm.save(tmp_path / "model")
    files = {split: tiny_lm.write(tmp_path / f"{split}.jsonl", tiny_lm.rows(6)) for split in ("train", "val")}

    def run(callback: LoRACallback, rate: float) -> tuple[Any, L.Trainer]:
        L.seed_everything(3, verbose=False)
        trainer = L.Trainer(max_epochs=2, callbacks=[callback], precision="64-true", enable_checkpointing=False, **QUIET)
        task = CausalLMTask(model, learning_rate=rate)
        trainer.fit(task, datamodule=InstructionDataModule(**files, batch_size=3, cache=False))
        return task, trainer

    trials = Trials([{"rank": 2, "learning_rate": 1e-2}, {"rank": 4, "name": "larger"}])
    _, trainer = run(LoRACallback(LoRAConfig(), sweep=trials, checkpointing="full"), 3e-3)
    for rank, rate, (name, mine) in zip((2, 4), (1e-2, 3e-3), trials.modules.items(), strict=True):
        other, theirs = run(LoRACallback(LoRAConfig(rank=rank), merge_on_fit_end=False, checkpointing="full"), rate)
        for one, two in zip(get_lora_parameters(mine), get_lora_parameters(other), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
        for key in ("val_accuracy", "val_loss", "train_loss"):
            assert float(trainer.callback_metrics[f"{name}/{key}"]) == pytest.approx(float(theirs.callback_metrics[key]), rel=1e-9)
