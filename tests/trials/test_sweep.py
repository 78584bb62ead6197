"""``sweep`` from Python: each trial is what ``fit`` of the same Trainer, module and loaders is."""

import copy
import json
import signal

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_lora import AdaLoRACallback, LoRACallback, LoRAConfig, get_lora_parameters, sweep
from lightning_lora.data import InstructionDataModule
from lightning_lora.tasks import CausalLMTask
from lightning_lora.trials.joint_step import JointStep
from tests import tiny_lm
from tests.trials.nets import Net, Own, Rows

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
TRIALS = [{"rank": 2, "lr": 0.05}, {"rank": 1, "lr": 0.02, "name": "small"}, {"rank": 3, "lr": 0.05, "seed": 1}]
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}


class Maker:
    """Makes trials, and keeps their modules."""

    def __init__(self, cls=Net, **options):
        self.cls, self.options, self.modules, self.seen = cls, options, [], []

    def __call__(self, settings, folder):
        self.seen.append(settings)
        lightning.seed_everything(settings.get("seed", 0))
        module = self.cls("dropout")
        module.configure_optimizers = lambda: torch.optim.Adam(module.parameters(), lr=settings["lr"], eps=1e-3)
        self.modules.append(module)
        config = LoRAConfig(rank=settings["rank"], dropout=0.1, target_modules=["0", "2"])
        options = {"max_epochs": 3, "logger": False, "enable_checkpointing": folder is not None, "default_root_dir": folder, **QUIET}
        callbacks = [LoRACallback(config, merge_on_fit_end=False), *self.options.get("callbacks", list)()]
        trainer = lightning.Trainer(**options | self.options.get("trainer", {}), callbacks=callbacks)
        return trainer, module, {"train_dataloaders": DataLoader(Rows(), 4, shuffle=True)}


def fit(make, settings):
    trainer, module, arguments = make(settings, None)
    trainer.fit(module, **arguments)
    return trainer, [p.detach() for p in get_lora_parameters(module)]


@pytest.fixture
def served(monkeypatch):
    """How many trials every joint step served."""
    found = []
    original = JointStep.__call__

    def counted(self, members, batches):
        found.append(len(members))
        return original(self, members, batches)

    monkeypatch.setattr(JointStep, "__call__", counted)
    return found


@pytest.mark.parametrize(("cls", "together"), [(Net, True), (Own, False)])
def test_each_trial_is_what_fit_is(cls, together, served, caplog):
    make, before = Maker(cls), copy.deepcopy(TRIALS)
    with caplog.at_level("INFO"):
        found = sweep(make, TRIALS)
    assert served == ([3] * 9 if together else [])
    if together:
        assert found.reason is None and make.modules[2].model[0].weight is make.modules[0].model[0].weight, "one base"
    else:
        assert f"The trials run one after another: {found.reason}." in caplog.text and "Own does not say" in found.reason
    for settings, outcome, module in zip(TRIALS, found.outcomes, make.modules, strict=True):
        trainer, alone = fit(Maker(cls), settings)
        for one, other in zip(get_lora_parameters(module), alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert outcome.last["train_loss"] == pytest.approx(float(trainer.callback_metrics["train_loss"]), rel=1e-6)
        assert (outcome.status, outcome.steps, outcome.monitor, outcome.folder) == ("complete", 9, "train_loss", "")
    assert [each.name for each in found.outcomes] == ["rank2-lr0.05", "small", "rank3-lr0.05-seed1"]
    assert found.best is min(found.outcomes, key=lambda each: each.best)
    assert before == TRIALS and make.seen == [{k: v for k, v in each.items() if k != "name"} for each in TRIALS]
    lines = str(found).splitlines()
    assert lines[0].split() == ["trial", "rank", "lr", "seed", "best", "train_loss", "at", "step", "steps", "status", "folder"]
    assert len(lines) == 4 and f"{found.outcomes[1].best:.6g}" in lines[2]


def test_our_tasks_train_side_by_side(served, tmp_path):
    model = tiny_lm.save(tmp_path / "model")
    files = {split: tiny_lm.write(tmp_path / f"{split}.jsonl", tiny_lm.rows(6)) for split in ("train", "val")}

    def make(settings, folder):
        lightning.seed_everything(3)
        quiet = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0, "precision": "64-true", **QUIET}
        callback = LoRACallback(LoRAConfig(rank=settings["rank"], dropout=0.1), merge_on_fit_end=False)
        trainer = lightning.Trainer(max_epochs=2, callbacks=[callback], **quiet)
        made.append((trainer, CausalLMTask(model, learning_rate=settings["lr"])))
        return *made[-1], {"datamodule": InstructionDataModule(**files, batch_size=3, cache=False)}

    made = []
    found = sweep(make, [{"rank": 2, "lr": 1e-2}, {"rank": 4, "lr": 3e-3}], side_by_side=True, monitor="val_accuracy")
    assert served == [2] * 4 and [each.mode for each in found.outcomes] == ["max", "max"]
    trainer, alone = fit(make, {"rank": 4, "lr": 3e-3})
    for one, other in zip(get_lora_parameters(made[1][1]), alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    assert found.outcomes[1].last["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]), rel=1e-6)


class Stops(Callback):
    """Raises, or sends a signal, at a step."""

    def __init__(self, step, error=None):
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            if self.error is None:
                signal.raise_signal(signal.SIGTERM)
            raise self.error


def failing(make, *ranks, error=None):
    def made(settings, folder):
        make.options["callbacks"] = lambda: [Stops(2, error or RuntimeError("out of luck"))] if settings["rank"] in ranks else []
        return make(settings, folder)

    return made


def test_a_trial_that_fails_leaves_the_others():
    make = Maker()
    found = sweep(failing(make, 1), TRIALS)
    assert [each.status for each in found.outcomes] == ["complete", "failed", "complete"]
    assert found.outcomes[1].error == "out of luck" and "failed: out of luck" in str(found) and found.best is not found.outcomes[1]
    for one, other in zip(get_lora_parameters(make.modules[2]), fit(Maker(), TRIALS[2])[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match=r"every trial failed; the first: AssertionError$"):
        sweep(failing(Maker(), 1, 2, 3, error=AssertionError()), TRIALS)


def test_the_same_call_goes_on(tmp_path):
    """What is complete is kept, what was interrupted resumes and ends as if it had not been."""
    folder, trials = tmp_path / "sweep", [{"rank": 2, "lr": 0.05, "short": True}, {"rank": 3, "lr": 0.05}]

    def make(settings, folder):
        maker.options = {"trainer": {"max_epochs": 1} if settings.get("short") else {}}
        maker.options["callbacks"] = lambda: [Stops(5)] if stop and settings["rank"] == 3 else []
        return maker(settings, folder)

    maker, stop = Maker(), True
    with pytest.raises(SystemExit) as told:
        sweep(make, trials, folder=folder)
    assert told.value.code == 128 + signal.SIGTERM
    record = json.loads((folder / "sweep.json").read_text())
    assert [each["status"] for each in record.values()] == ["complete", "interrupted"]
    stop = False
    found = sweep(make, trials, folder=folder)
    assert [(each.status, each.steps) for each in found.outcomes] == [("complete", 3), ("complete", 9)] and len(maker.seen) == 3
    assert found.outcomes[1].folder == str(folder / "rank3-lr0.05") and len((folder / "sweep.csv").read_text().splitlines()) == 3
    for one, other in zip(get_lora_parameters(maker.modules[-1]), fit(Maker(), trials[1])[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    again = sweep(make, trials, folder=folder, monitor="train_loss", mode="max")
    assert str(again.best) == str(max(again.outcomes, key=lambda each: each.best)) and len(maker.seen) == 3, "compared anew, not trained"
    with pytest.raises(ValueError, match=r"holds another sweep: its trial 'rank3-lr0.05' has other settings"):
        sweep(make, [trials[0], {"rank": 3, "lr": 0.0500001, "name": "rank3-lr0.05"}], folder=folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"make": None}, "make=None must be a function"),
        ({"trials": []}, r"trials=\[\] must be a list"),
        ({"trials": {"rank": 2}}, "must be a list"),
        ({"trials": "rank"}, "must be a list"),
        ({"trials": [{"rank": 2}, {}]}, r"trials\[1\]=\{\} must be a mapping"),
        ({"trials": [{3: 2}]}, r"trials\[0\]=.* must be a mapping with names"),
        ({"trials": [{"dtype": torch.float64}]}, r"trials\[0\]\['dtype'\]=torch.float64 is of type dtype; give a number"),
        ({"trials": [{"rank": 2}, {"rank": 2}]}, "two trials are 'rank2'"),
        ({"trials": [{"rank": 2, "name": "a/b"}]}, "'a/b' is no folder's name"),
        ({"at_once": 0}, "at_once=0 must be at least 1"),
        ({"side_by_side": "yes"}, "side_by_side='yes' must be"),
        ({"mode": "most", "monitor": "loss"}, "mode='most' must be"),
        ({"mode": "max"}, "mode='max' is said of no value"),
        ({"folder": "{file}"}, "is a file; name a folder"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_anything_is_made(arguments, message, tmp_path):
    (tmp_path / "file").write_text("")
    make = Maker()
    given = {"make": make, "trials": TRIALS} | {key: tmp_path / "file" if value == "{file}" else value for key, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        sweep(given.pop("make"), given.pop("trials"), **given)
    assert make.seen == []


LOADER, MODEL, CALLBACK = DataLoader(Rows(), 4), Net("plain").model, Callback()


class Batches(list):
    """A loader for Lightning, which takes a plain list for several loaders."""


class Data(lightning.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Rows(), 4)


BATCHES, MODULE = Batches(DataLoader(Rows(), 4)), Data()
ITERATOR = iter(BATCHES)


def changed(index, value):
    """A maker whose result has another value in one place."""

    def make(settings, folder):
        found = list(Maker()(settings, folder))
        found[index] = value(*found)
        return tuple(found)

    return make


def on_one_base(trainer, module, arguments):
    module.model = MODEL
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda settings, folder: Maker()(settings, folder)[:2],
            "rank2-lr0.05: make returned Trainer, Net; return a Trainer, a LightningModule and a dict",
        ),
        (changed(0, lambda *_: None), "make returned NoneType, Net, dict"),
        (changed(1, lambda *_: torch.nn.Linear(2, 2)), "make returned Trainer, Linear, dict"),
        (changed(2, lambda *_: LOADER), "make returned Trainer, Net, DataLoader"),
        (changed(2, lambda *_: {"loader": LOADER}), "'loader' is no argument of fit; there are ckpt_path"),
        (changed(2, lambda *_: {"train_dataloaders": [LOADER]}), "small: train_dataloaders is an object of the trial 'rank2-lr0.05' too"),
        (changed(2, lambda *_: {"train_dataloaders": ITERATOR}), "small: train_dataloaders is an object of the trial"),
        (changed(2, lambda *_: {"datamodule": MODULE}), "small: datamodule is an object of the trial"),
        (changed(1, on_one_base), "small: module model is an object of the trial 'rank2-lr0.05' too"),
        (Maker(callbacks=lambda: [CALLBACK]), "small: Callback is an object of the trial"),
        (Maker(callbacks=lambda: [LoRACallback(LoRAConfig())]), "has 2 LoRACallbacks"),
        (Maker(callbacks=lambda: [AdaLoRACallback()]), "LoRACallbacks"),
        (Maker(trainer={"default_root_dir": "elsewhere"}), r"Trainer\(default_root_dir\) is .*elsewhere, and the trial's folder is"),
        (Maker(trainer={"logger": CSVLogger("elsewhere")}), r"CSVLogger\(save_dir\) is .*elsewhere"),
        (Maker(callbacks=lambda: [ModelCheckpoint("elsewhere")]), r"ModelCheckpoint\(dirpath\) is .*elsewhere"),
    ],
)
def test_what_is_no_trial_is_refused(make, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        sweep(make, TRIALS, folder="sweep")


def test_batches_that_are_read_by_number_may_be_shared():
    found = sweep(changed(2, lambda *_: {"train_dataloaders": BATCHES}), TRIALS)
    assert [each.status for each in found.outcomes] == ["complete"] * 3


def test_a_monitor_that_nothing_logs_is_said():
    with pytest.warns(UserWarning, match=r"monitor='val_los' was not logged; there are \w+"):
        found = sweep(Maker(trainer={"max_epochs": 1}), TRIALS[:1], monitor="val_los")
    assert found.best is None and found.outcomes[0].status == "complete"


def test_side_by_side_may_be_required_or_left_out(served):
    with pytest.raises(ValueError, match="side_by_side=True: Own does not say"):
        sweep(Maker(Own), TRIALS, side_by_side=True)
    assert sweep(Maker(), TRIALS[:2], side_by_side=False).reason == "as told" and served == []
