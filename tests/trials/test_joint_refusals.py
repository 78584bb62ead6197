"""What one ``fit`` cannot do for several trials is refused by name, before anything changes."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_lora import AdaLoRACallback, LoRACallback, LoRAConfig, Trials, apply_lora
from lightning_lora.trials.joint_refusals import check_run
from lightning_lora.trials.own_settings import read_settings

CONFIG = LoRAConfig(rank=1, target_modules=["0"])


class Lit(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


class Manual(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class OwnStep(Lit):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None: ...


def adapted() -> Lit:
    module = Lit()
    apply_lora(module.model, config=CONFIG)
    return module


def check(
    callback: Any = None, module: Any = Lit, trials: Any = ({"rank": 2},), callbacks: Any = (), fn: Any = TrainerFn.FITTING, **options: Any
) -> None:
    callback = callback or LoRACallback(CONFIG)
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False} | options
    trainer = L.Trainer(callbacks=[callback, *callbacks], enable_progress_bar=False, **options)
    trainer.state.fn = fn
    check_run(callback, trainer, module(), read_settings(trials, callback))


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ({"fn": TrainerFn.TESTING}, "test has no trial to run; load one with load_adapter"),
        (
            {"callback": AdaLoRACallback(LoRAConfig(target_modules=["0"]))},
            "AdaLoRACallback changes ranks while it trains; use the function sweep",
        ),
        ({"callbacks": [LoRACallback(CONFIG, module="model.1")]}, "the Trainer has 2 LoRACallbacks"),
        ({"trials": [{"rank": 1, "name": "a.b"}, {"rank": 2, "name": "a_b"}]}, "the trials 'a.b' and 'a_b' differ in dots only"),
        ({"callback": LoRACallback(CONFIG, quantize="nf4")}, "quantize='nf4' works on one model"),
        ({"callback": LoRACallback(CONFIG, compile="layer")}, "compile='layer' works on one model"),
        ({"callback": LoRACallback(CONFIG, offload="frozen")}, "offload='frozen' works on one model"),
        ({"strategy": "ddp"}, "strategy=DDPStrategy is for several devices"),
        ({"module": Manual}, "Manual optimizes manually"),
        ({"module": OwnStep}, "OwnStep overrides optimizer_step"),
        ({"module": adapted}, "'model.0' has LoRA already; unload_lora"),
        ({"trials": [{"rank": 2}, {"init": "eva", "name": "e"}]}, "init='eva' of the trial 'e' reads data"),
        (
            {"callbacks": [ModelCheckpoint(monitor="val_loss")], "enable_checkpointing": True},
            "monitor='val_loss'.*name one trial's rank2/val_loss",
        ),
        ({"callbacks": [EarlyStopping("rank2/val_loss")]}, r"EarlyStopping\(monitor='rank2/val_loss'\).*name it 'val_loss'"),
        ({"callbacks": [LearningRateFinder()]}, "LearningRateFinder tries one run"),
        ({"callbacks": [EarlyStopping("val_loss")], "min_epochs": 2}, "EarlyStopping with min_epochs or min_steps"),
    ],
)
def test_refused(case, says):
    with pytest.raises(ValueError, match=f"sweep: .*{says}"):
        check(**case)


def test_what_a_run_of_its_own_refuses():
    with pytest.raises(ValueError, match="StochasticWeightAveraging copies the whole model"):
        check(callbacks=[StochasticWeightAveraging(1e-2)])


def test_a_list_in_place_of_trials():
    with pytest.raises(ValueError, match=r"sweep=\[\{'rank': 2\}\]: give lightning_lora.Trials, such as sweep=Trials\("):
        LoRACallback(CONFIG, sweep=[{"rank": 2}])


def test_the_rest_is_not():
    check()
    check(callbacks=[ModelCheckpoint(monitor="rank2/val_loss"), EarlyStopping("val_loss")], enable_checkpointing=True, max_epochs=3)


@pytest.mark.parametrize(
    ("trials", "says"),
    [
        ([], r"trials=\[\] must be a list of settings"),
        ("rank", "trials='rank' must be a list"),
        ([{}], r"trials\[0\]=\{\} must be a mapping"),
        ([{"rank": 2}, {"rnak": 4}], r"trials\[1\]: 'rnak' is not known; a trial may have name, rank, alpha"),
        ([{"rank": 2}, {"rank": 2}], "two trials are 'rank2'"),
        ([{"rank": 2, "name": "a/b"}], "'a/b' is no folder's name"),
        ([{"rank": 0}], r"trials\[0\]: rank=0: the rank is a whole number"),
        ([{"target_modules": []}], r"trials\[0\]: target_modules=\(\) names nothing"),
        ([{"learning_rate": "auto"}], r"trials\[0\]: learning_rate='auto': give a finite number"),
        ([{"weight_decay": float("inf")}], "weight_decay=inf: give a finite number"),
        ([{"seed": -1}], r"seed=-1: give a whole number"),
        ([{"lora_plus_ratio": 0}], r"trials\[0\]: lora_plus_ratio=0: give a number > 0"),
        ([{"precondition": "none"}], r"trials\[0\]: precondition='none'"),
    ],
)
def test_wrong_trials(trials, says):
    with pytest.raises(ValueError, match=says):
        Trials(trials)


def test_wrong_options():
    with pytest.raises(ValueError, match="mode='larger' must be"):
        Trials([{"rank": 2}], monitor="loss", mode="larger")
    with pytest.raises(ValueError, match="mode='max' is said of no value"):
        Trials([{"rank": 2}], mode="max")


def test_a_trial_that_matches_nothing_leaves_all_as_it_was():
    trials, module = Trials([{"rank": 2}, {"target_modules": ["nowhere"], "name": "n"}]), Lit()
    callback = LoRACallback(CONFIG, sweep=trials)
    trainer = L.Trainer(
        callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1
    )
    module.training_step = lambda batch, index: None
    module.configure_optimizers = lambda: None
    with pytest.raises(ValueError, match="trial 'n': target_modules: 'nowhere' matches no"):
        trainer.fit(module, [1])
    assert trainer.lightning_module is module and trainer.callbacks[0] is callback and all(p.requires_grad for p in module.parameters())
    assert not hasattr(trainer.strategy, "_lora_hooks") and type(module.model[0]) is nn.Linear
