"""``LoRACallback(sweep=Trials([...]))``: each trial of one ``fit`` is what a fit of its own is."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_lora import LoRACallback, LoRAConfig, Trials, get_lora_parameters, load_adapter, quantize_base
from lightning_lora.data import InstructionDataModule
from lightning_lora.tasks import CausalLMTask
from lightning_lora.trials.own_settings import OPTIONS
from tests import tiny_lm
from tests.callbacks.lora_runs import Resumable
from tests.trials.nets import Rows

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*in your `training_step`")
QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
CONFIG = LoRAConfig(rank=2, dropout=0.2, target_modules=["0", "4"])


class Lit(L.LightningModule):
    """Has all that trials must not share: dropout, BatchNorm, a metric, a list that steps append to, a scheduler, a batch taken apart."""

    def __init__(self, learning_rate: float = 0.05, weight_decay: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.model = nn.Sequential(
                nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
            )
        self.model = self.model.double()
        self.accuracy = MulticlassAccuracy(3)
        self.seen: list[float] = []
        self.steps = 0

    def loss(self, batch: dict[str, Any]) -> Any:
        labels = batch.pop("labels")  # as the code of many models does
        logits = self.model(batch["pixel_values"])
        return F.cross_entropy(logits, labels), logits, labels

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, *_ = self.loss(batch)
        self.steps += 1
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "kept": loss.item()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("kept", outputs["kept"] + float(outputs["loss"]))

    def validation_step(self, batch: Any) -> None:
        loss, logits, labels = self.loss(batch)
        self.accuracy(logits, labels)
        self.seen.append(float(loss))
        self.log("val_accuracy", self.accuracy, on_epoch=True)
        self.log_dict({"val_loss": loss})

    def on_validation_epoch_end(self) -> None:
        self.log("val_worst", max(self.seen))
        self.seen.clear()

    def configure_optimizers(self) -> Any:
        rates = {"lr": self.hparams["learning_rate"], "weight_decay": self.hparams["weight_decay"]}
        optimizer = torch.optim.AdamW(self.parameters(), **rates, eps=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loaders() -> tuple[DataLoader, DataLoader]:
    """Loaders that draw nothing of the run's random numbers."""
    mine = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return DataLoader(Rows(), 4, shuffle=True, generator=mine[0]), DataLoader(Rows(), 4, generator=mine[1])


def resumable() -> tuple[DataLoader, DataLoader]:
    """Loaders of which Lightning keeps the place in the epoch."""
    return Resumable(Rows(), 4, generator=torch.Generator()), loaders()[1]


def fit(
    module: L.LightningModule, callback: LoRACallback, *callbacks: Callback, seed: int = 7, ckpt: Any = None, **options: Any
) -> L.Trainer:
    L.seed_everything(seed, verbose=False)
    options = {"max_epochs": 3, "enable_checkpointing": False} | options
    train, val = options.pop("loaders", loaders)()
    trainer = L.Trainer(callbacks=[callback, *callbacks], **QUIET | options)
    trainer.fit(module, train, val, ckpt_path=ckpt)
    return trainer


def alone(
    given: dict[str, Any], *callbacks: Callback, config: LoRAConfig = CONFIG, make: Any = Lit, **options: Any
) -> tuple[Any, L.Trainer]:
    """A fit with a trial's settings, without a sweep."""
    config = replace(config, **{key: value for key, value in given.items() if hasattr(config, key)})
    rates = {key: value for key, value in given.items() if key in ("learning_rate", "weight_decay")}
    callback = LoRACallback(config, merge_on_fit_end=False, **{key: value for key, value in given.items() if key in OPTIONS})
    module = make(**rates)
    return module, fit(module, callback, *callbacks, seed=given.get("seed", 7), **options)


def same(one: nn.Module, other: nn.Module) -> None:
    """All parameters and buffers are equal; the adapter has moved."""
    states = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-9, atol=1e-11, msg=name)
    assert get_lora_parameters(one)[1].abs().max() > 0


GIVEN = [
    {"rank": 2},
    {"rank": 1, "learning_rate": 0.02, "weight_decay": 0.0, "name": "small"},
    {"rank": 3, "seed": 5, "lora_plus_ratio": 4.0, "dropout": 0.0},
    {"variant": "dora", "target_modules": ["4"], "modules_to_save": ["6"], "alpha": 3.0},
]


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


STOPPING = [{"learning_rate": 0.05}, {"learning_rate": 20.0, "name": "wild"}]


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


# Checkpoints.


def saver(folder: Any, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_top_k=-1, filename="{step}", enable_version_counter=False, **options)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(("every", "step"), [({}, 6), ({"every_n_train_steps": 1}, 4)])
def test_a_resumed_run_is_the_run(tmp_path, every, step):
    def run(*callbacks: Callback, **options: Any) -> tuple[Trials, L.Trainer]:
        trials = Trials([GIVEN[2], *STOPPING])
        stop = EarlyStopping("val_loss", patience=1, min_delta=0.02)
        return trials, fit(
            Lit(),
            LoRACallback(CONFIG, sweep=trials),
            stop,
            *callbacks,
            max_epochs=5,
            loaders=resumable,
            enable_checkpointing=True,
            **options,
        )

    whole, trainer = run(saver(tmp_path / "a", **every))
    file = tmp_path / "a" / f"step={step}.ckpt"
    resumed, again = run(saver(tmp_path / "b", **every), seed=99, ckpt=file)
    assert again.global_step == trainer.global_step
    for one, other in zip(whole.modules.values(), resumed.modules.values(), strict=True):
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    kept = [[(each.best, each.best_step, each.steps, each.status) for each in trials.result.outcomes] for trials in (whole, resumed)]
    assert kept[0] == kept[1] and len({each[2] for each in kept[0]}) > 1
    names = torch.load(file, weights_only=True)["state_dict"]
    assert any("lora_A" in name for name in names) and not any(name.endswith(("0.weight", "4.weight")) for name in names), "no base"
    assert file.stat().st_size < 200_000
    for other, says in (
        ([GIVEN[2], {"alpha": 16.0, "name": "learning_rate0.05"}, STOPPING[1]], "its trial 'learning_rate0.05' has other settings"),
        ([GIVEN[2], *STOPPING[:1]], "here they are on"),
    ):
        callback = LoRACallback(CONFIG, sweep=Trials(other))
        with pytest.raises(ValueError, match=says):
            fit(Lit(), callback, saver(tmp_path / "c", **every), ckpt=file, enable_checkpointing=True)


class Stops(Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 4:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_an_interrupted_run_leaves_a_checkpoint_to_resume(tmp_path):
    trials, module = Trials(GIVEN[:2]), Lit()
    with pytest.raises(SystemExit) as ended:
        fit(module, LoRACallback(CONFIG, sweep=trials), Stops(), saver(tmp_path), enable_checkpointing=True, loaders=resumable)
    assert ended.value.code == 143 and not get_lora_parameters(module)
    trials = Trials(GIVEN[:2])
    fit(
        Lit(),
        LoRACallback(CONFIG, sweep=trials),
        saver(tmp_path),
        ckpt=tmp_path / "last-interrupted.ckpt",
        enable_checkpointing=True,
        loaders=resumable,
    )
    for given, mine in zip(GIVEN, trials.modules.values(), strict=False):
        same(mine, alone(given, loaders=resumable)[0])


# Bases.


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


# Folders, the command line, refusals.


def test_a_folder_holds_each_trials_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    trials = Trials(STOPPING, folder=tmp_path / "sweep", monitor="val_worst", mode="min")
    fit(Lit(), LoRACallback(replace(CONFIG, dropout=0.0), sweep=trials), max_epochs=3)
    x = torch.randn(5, 6, dtype=torch.float64)
    for outcome in trials.result.outcomes:
        mine, folder = trials.modules[outcome.name].eval(), tmp_path / "sweep" / outcome.name
        assert outcome.folder == str(folder)
        fresh = Lit().eval()
        fresh.model[1].load_state_dict(mine.model[1].state_dict())
        theirs = peft.PeftModel.from_pretrained(Lit().eval().model, folder / "last")
        theirs.base_model.model[1].load_state_dict(mine.model[1].state_dict())
        load_adapter(fresh, folder / "last")
        torch.testing.assert_close(fresh.model(x), mine.model(x), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(theirs(x), mine.model(x), rtol=1e-6, atol=1e-6)
        best = load_adapter(Lit(), folder / "best")
        equal = all(map(torch.equal, get_lora_parameters(best), get_lora_parameters(fresh)))
        assert equal == (outcome.best_step == outcome.steps)
    assert (tmp_path / "sweep" / "sweep.csv").read_text().startswith("trial,learning_rate,best val_worst,at step")
    with pytest.raises(ValueError, match="holds another sweep"):
        fit(Lit(), LoRACallback(CONFIG, sweep=Trials([{"rank": 1}], folder=tmp_path / "sweep")))


@pytest.mark.filterwarnings("ignore:LightningCLI's args", "ignore:No seed found", "ignore::DeprecationWarning")
def test_lightning_cli_reads_it_from_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"""
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_lora.LoRACallback
      init_args:
        config: {{rank: 2, target_modules: ["0", "4"]}}
        sweep:
          class_path: lightning_lora.Trials
          init_args:
            trials: [{{rank: 2}}, {{rank: 4, learning_rate: 1.0e-3, name: larger}}]
            folder: {tmp_path}/sweep
"""
    )

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return loaders()[0]

        def val_dataloader(self) -> DataLoader:
            return loaders()[1]

    cli = LightningCLI(Lit, Data, args=["fit", "--config", str(tmp_path / "run.yaml")], save_config_callback=None)
    (callback,) = (each for each in cli.trainer.callbacks if isinstance(each, LoRACallback))
    assert [each.status for each in callback.sweep.result.outcomes] == ["complete"] * 2
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["larger", "rank2", "sweep.csv", "sweep.json"]
