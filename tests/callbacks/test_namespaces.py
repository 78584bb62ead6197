"""``import pytorch_lightning`` works as ``lightning.pytorch`` does: each test runs under both."""

from __future__ import annotations

import importlib
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import pytorch_lightning
import torch
from pytorch_lightning.cli import LightningCLI

from lightning_lora import AdaLoRACallback, DurableCheckpointIO, LoRACallback, LoRAConfig, LoRALinear
from lightning_lora.callbacks.interruption import NAME, Interruption
from lightning_lora.callbacks.merging import check_mergeable
from lightning_lora.callbacks.refusals import recordable
from lightning_lora.layers import lora_layers
from lightning_lora.strategies import arrange, check_supported, convert_base
from lightning_lora.tasks import CausalLMTask
from tests.lit import CONFIG, LitNet, bits, make_net

pytestmark = pytest.mark.filterwarnings(
    *("ignore:Checkpoint directory", "ignore:Be aware that when", "ignore:You're resuming", "ignore:The dirpath has changed"),
    *("ignore:.*was called without a model", "ignore:.*there is no last checkpoint"),
)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def P(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(request.param)


def lit(package: Any, late: bool = False) -> Any:
    """A :class:`LitNet` over the LightningModule of this package."""

    def build(self: Any) -> None:
        package.LightningModule.__init__(self)
        self.net, self.schedule, self.losses = None if late else make_net(), None, []

    body = {name: value for name, value in vars(LitNet).items() if name not in ("__dict__", "__weakref__", "__module__")}
    return type("Lit", (package.LightningModule,), {**body, "__init__": build})()


def trainer(package: Any, folder: Path, *callbacks: Any, **kwargs: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    kwargs.setdefault("enable_checkpointing", any(isinstance(each, package.callbacks.Checkpoint) for each in callbacks))
    return package.Trainer(
        **{"max_epochs": 1, "accelerator": "cpu", "devices": 1, **quiet, **kwargs}, callbacks=list(callbacks), default_root_dir=folder
    )


def saver(package: Any, folder: Path) -> Any:
    return package.callbacks.ModelCheckpoint(folder, save_last=True, enable_version_counter=False)


@pytest.mark.parametrize("late", [False, True], ids=["built in __init__", "built in configure_model"])
def test_fits_saves_resumes_tests_and_merges_as_lightning_does(P: Any, tmp_path: Path, late: bool) -> None:
    def fit(package: Any, folder: Path, epochs: int, ckpt: Path | None = None) -> tuple[Any, Any]:
        torch.manual_seed(0)
        module, run = lit(package, late), trainer(package, folder, LoRACallback(CONFIG), saver(package, folder), max_epochs=epochs)
        run.fit(module, ckpt_path=ckpt)
        return module, run

    whole, _ = fit(L.pytorch, tmp_path / "lightning", 2)
    half, _ = fit(P, tmp_path / "mine", 1)
    saved = torch.load(tmp_path / "mine/last.ckpt", weights_only=True)
    assert not any("weight" in name and "norm" not in name for name in saved["state_dict"]) and "lightning_lora" in saved
    module, run = fit(P, tmp_path / "mine", 2, tmp_path / "mine/last.ckpt")
    assert half.losses + module.losses == whole.losses
    assert type(run.strategy.checkpoint_io) is DurableCheckpointIO and "configure_model" not in module.__dict__
    assert all(layer.merged for _, layer in lora_layers(module))
    mine, expected = bits(module), bits(whole)
    assert mine.keys() == expected.keys() and all(torch.equal(mine[name], expected[name]) for name in mine)
    merged = run.test(module, verbose=False)[0]["test"]
    loaded = run.test(module, ckpt_path=tmp_path / "mine/last.ckpt", verbose=False)[0]["test"]  # unmerges first
    assert not any(layer.merged for _, layer in lora_layers(module)) and loaded == pytest.approx(merged, abs=1e-6)


def test_adalora_finds_the_same_ranks(P: Any, tmp_path: Path) -> None:
    found = []
    for package in (L.pytorch, P):
        torch.manual_seed(0)
        adalora = AdaLoRACallback(LoRAConfig(target_modules=["fc1", "fc2"]), init_rank=3, target_rank=2, tinit=1, tfinal=1)
        trainer(package, tmp_path, adalora, max_epochs=2).fit(lit(package))
        found.append(adalora.ranks)
    assert found[0] == found[1] and sum(found[0].values()) == 4


@pytest.mark.parametrize("saves_itself", [False, True])
def test_sigterm_leaves_a_checkpoint_and_its_exit_code(P: Any, tmp_path: Path, saves_itself: bool) -> None:
    class Stop(P.Callback):
        def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 1:
                signal.raise_signal(signal.SIGTERM)

    savers = [saver(P, tmp_path), *[P.callbacks.OnExceptionCheckpoint(str(tmp_path), "mine")] * saves_itself]
    with pytest.raises(P.utilities.exceptions.SIGTERMException) as stop:
        trainer(P, tmp_path, LoRACallback(CONFIG), Stop(), *savers, max_epochs=1).fit(lit(P))
    assert stop.value.code == 143
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["mine.ckpt" if saves_itself else NAME]


def test_several_processes_stop_with_the_trainers_own_exception(P: Any, tmp_path: Path) -> None:
    companion = Interruption()
    companion._stop = SimpleNamespace(after_batch=lambda told: True)  # type: ignore[assignment]
    run = trainer(P, tmp_path)
    companion.on_train_batch_end(run, lit(P), None, None, 0)
    assert run.received_sigterm  # its loop raises once the batch is counted
    run.state.fn = P.trainer.states.TrainerFn.FITTING
    with pytest.raises(P.utilities.exceptions.SIGTERMException):
        companion.on_validation_batch_start(run, lit(P), None, 0)


def test_the_durable_io_is_a_plugin(P: Any, tmp_path: Path) -> None:
    run = trainer(P, tmp_path, plugins=[DurableCheckpointIO()])
    assert type(run.strategy.checkpoint_io) is DurableCheckpointIO
    own = P.plugins.io.AsyncCheckpointIO(DurableCheckpointIO())
    trainer(P, tmp_path, LoRACallback(CONFIG), saver(P, tmp_path), plugins=[own], max_epochs=1).fit(lit(P))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=0-step=4.ckpt", "last.ckpt"]


class Both(LoRACallback, pytorch_lightning.Callback):
    """What README names for pl's LightningCLI, which wants a subclass of its own ``Callback``."""


def test_pls_cli_takes_a_class_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning's own CLI calls
    monkeypatch.setattr(sys, "argv", ["fit.py"])  # Lightning warns of options in both
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": str(tmp_path), "enable_checkpointing": False}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    named = [f"--trainer.callbacks={__name__}.Both", "--trainer.callbacks.config.target_modules=[fc1]"]
    cli = LightningCLI(
        type(lit(pytorch_lightning)), run=False, seed_everything_default=False, args=named, trainer_defaults={**options, **quiet}
    )
    cli.trainer.fit(cli.model)
    assert [type(layer) for _, layer in lora_layers(cli.model)] == [LoRALinear] and isinstance(cli.trainer.callbacks[0], Both)


# What is refused, or arranged, by class.


def made(cls: type) -> Any:
    """An object of a class whose library or device is not here."""
    return cls.__new__(cls)


REFUSED = {
    "strategy=object is not supported": lambda P: {"strategy": object()},
    "strategy=DeepSpeedStrategy": lambda P: {"strategy": made(P.strategies.DeepSpeedStrategy)},
    "start method 'spawn'": lambda P: {"strategy": P.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False).strategy},
    "replaces every linear layer": lambda P: {"precision_plugin": made(P.plugins.TransformerEnginePrecision)},
    "WeightAveraging copies": lambda P: {"callbacks": [made(P.callbacks.WeightAveraging)]},
    "StochasticWeightAveraging copies": lambda P: {"callbacks": [P.callbacks.StochasticWeightAveraging(1e-2)]},
    "use_orig_params=False": lambda P: {"strategy": P.strategies.FSDPStrategy(use_orig_params=False)},
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.filterwarnings("ignore:`enable_checkpointing", "ignore:Starting from v1.9.0")
def test_is_refused_alike(P: Any, reason: str) -> None:
    fields = {"strategy": P.strategies.SingleDeviceStrategy("cpu"), "callbacks": [], "precision_plugin": None}
    with pytest.raises(ValueError, match=reason):
        check_supported(SimpleNamespace(**fields | REFUSED[reason](P)))  # type: ignore[arg-type]


def test_a_strategy_whose_own_saving_would_be_skipped_is_refused(P: Any, tmp_path: Path) -> None:
    saves = type("Saves", (P.strategies.SingleDeviceStrategy,), {"save_checkpoint": lambda self: None, "__module__": __name__})
    with pytest.raises(ValueError, match=r"strategy=Saves: .*overrides save_checkpoint"):
        trainer(P, tmp_path, LoRACallback(CONFIG), strategy=saves("cpu")).fit(lit(P))


def test_sharding_strategies_are_known(P: Any) -> None:
    fsdp, sharded = P.strategies.FSDPStrategy(), P.strategies.ModelParallelStrategy()
    for strategy in (fsdp, sharded):
        with pytest.raises(ValueError, match="cuda_graphs=True with strategy="):
            recordable(strategy)
        module, own = lit(P), strategy.precision_plugin.clip_grad_by_norm
        module.requires_grad_(False)
        arrange(strategy, module)
        assert strategy.precision_plugin.clip_grad_by_norm != own
    assert fsdp.kwargs["ignored_states"] == []
    net = make_net().requires_grad_(False)
    report = SimpleNamespace(targets=[], rows=[])
    check_mergeable(net, report, sharded, None, None)  # type: ignore[arg-type]


def test_a_converting_precision_converts_before_lora(P: Any) -> None:
    plugin, seen = made(P.plugins.BitsandbytesPrecision), []
    plugin.convert_module = seen.append
    module = lit(P)
    convert_base(SimpleNamespace(precision_plugin=plugin), module)  # type: ignore[arg-type]
    assert seen == [module]


# Both at once.

PAIRS = pytest.mark.parametrize(("mine", "other"), [(L.pytorch, pytorch_lightning), (pytorch_lightning, L.pytorch)], ids=["L", "pl"])


@PAIRS
def test_a_module_of_the_other_package_is_refused(mine: Any, other: Any, tmp_path: Path) -> None:
    module = lit(other)
    run = trainer(mine, tmp_path, LoRACallback(CONFIG))
    for call in (run.fit, run.validate, run.test, run.predict):
        with pytest.raises(TypeError, match=f"You passed a `{other.__name__}` object.*`{mine.__name__}`.*single import style"):
            call(module)
    assert not list(lora_layers(module))


def test_our_own_tasks_are_lightnings(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"You passed a `lightning.pytorch` object.*single import style"):
        trainer(pytorch_lightning, tmp_path, LoRACallback(CONFIG)).fit(made(CausalLMTask))


@pytest.mark.parametrize("name", ["ModelCheckpoint", "RichProgressBar", "LearningRateFinder"])
@PAIRS
def test_a_callback_that_the_trainer_goes_by_is_refused_of_the_other_package(mine: Any, other: Any, name: str, tmp_path: Path) -> None:
    """A Tuner adds its finder to the callbacks, and ends the fit by an exception of its own package."""
    module, callback = lit(mine), getattr(other.callbacks, name)()
    with pytest.raises(ValueError, match=f"{name} is not of the Trainer's package \\({mine.__name__}\\).*both, and Tuner, from one"):
        trainer(mine, tmp_path, LoRACallback(CONFIG), callback).fit(module)
    assert not list(lora_layers(module))


def test_another_version_is_refused(P: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(P, tmp_path)
    monkeypatch.setattr(pytorch_lightning, "__version__", "2.4.0")
    if P is L.pytorch:  # then it does not matter
        check_supported(run)
        return
    with pytest.raises(ValueError, match=f"pytorch_lightning is 2.4.0 and lightning is {L.__version__}"):
        check_supported(run)
