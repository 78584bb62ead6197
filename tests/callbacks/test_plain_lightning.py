"""What a plain Lightning run allows, under ``LoRACallback``: found by running Lightning's own tests (tests/harness/lightning_suite.py)."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import signal
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, apply_lora, save_adapter
from lightning_lora.callbacks.interruption import Interruption
from lightning_lora.layers.base import lora_layers
from lightning_lora.strategies.kept_layers import keeping_adapters
from tests.lit import CONFIG, LitNet, make_net, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Be aware that when")


class NoOptimizer(LitNet):
    def configure_optimizers(self) -> Any:
        return None


@pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer", "ignore:fit ended without a step")
def test_a_run_without_an_optimizer_saves_and_resumes(tmp_path: Path) -> None:
    """Lightning warns that it trains nothing; its stand-in for an optimizer has no state."""
    module, saver = NoOptimizer(), ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, LoRACallback(CONFIG), saver, max_epochs=1).fit(module)
    steps = len(module.losses)
    trainer(tmp_path, LoRACallback(CONFIG), max_epochs=2).fit(module, ckpt_path=saver.last_model_path)
    assert steps and module.losses[steps:] == module.losses[:steps]


def test_a_checkpoint_that_is_not_there_is_lightnings_error_too(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^Checkpoint file not found: .*none\.ckpt\.$") as error:
        trainer(tmp_path, LoRACallback(CONFIG), max_epochs=1).fit(LitNet(), ckpt_path=str(tmp_path / "none.ckpt"))
    assert isinstance(error.value, ValueError)


class Copies(L.Callback):
    """Copies all callbacks within the run, as some loggers and sweeps do."""

    def __init__(self) -> None:
        self.copies: list[list[L.Callback]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.copies.append(copy.deepcopy(trainer.callbacks))  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: Any) -> Copies:
        return Copies()


def test_callbacks_can_be_copied_within_a_run(tmp_path: Path) -> None:
    """A copy has the settings and nothing of the run; it adapts another module as the first did."""
    lora, copies = LoRACallback(CONFIG, lora_plus_ratio=4.0), Copies()
    trainer(tmp_path, lora, copies, max_epochs=1).fit(LitNet())
    copied = next(callback for callback in copies.copies[-1] if isinstance(callback, LoRACallback))
    pickled = pickle.loads(pickle.dumps(lora))
    for other in (copied, pickled):
        assert (other.config, other.lora_plus_ratio, other.part, other._watch) == (CONFIG, 4.0, None, None)
        module = LitNet()
        trainer(tmp_path, other, max_epochs=1).fit(module)
        assert len(dict(lora_layers(module))) == 2


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))], ids=["copy", "pickle"])
def test_a_trainer_can_be_copied_after_a_run(tmp_path: Path, copied: Any, merge: bool) -> None:
    """As ``torch.save(trainer)`` does. The copy saves, trains and resumes its own module; the first one is left alone."""
    run, module = trainer(tmp_path, LoRACallback(CONFIG, merge_on_fit_end=merge), max_epochs=1), LitNet()
    run.fit(module)
    other = copied(run)
    mine = other.lightning_module
    for name, each in {"first": run, "other": other}.items():
        each.save_checkpoint(tmp_path / f"{name}.ckpt")
    first, second = (torch.load(tmp_path / f"{name}.ckpt") for name in ("first", "other"))
    assert second.keys() == first.keys() and second["lightning_lora"] == first["lightning_lora"]
    torch.testing.assert_close(second["state_dict"], first["state_dict"], rtol=0, atol=0)
    before = {name: p.clone() for name, p in module.named_parameters()}
    other.fit_loop.max_epochs = 2
    other.fit(mine, ckpt_path=tmp_path / "other.ckpt")
    assert mine is not module and other.current_epoch == 2
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert not any(torch.equal(p, before[name]) for name, p in mine.named_parameters() if "lora_" in name)


class Configured(LitNet):
    def configure_model(self) -> None:
        """Builds nothing."""


def test_a_trainer_whose_module_has_configure_model_can_be_pickled(tmp_path: Path) -> None:
    run = trainer(tmp_path, LoRACallback(CONFIG), max_epochs=1)
    run.fit(Configured())
    other = pickle.loads(pickle.dumps(run))
    other.save_checkpoint(tmp_path / "other.ckpt")
    assert torch.load(tmp_path / "other.ckpt")["state_dict"].keys() == run.strategy.lightning_module_state_dict().keys()


def test_the_trainer_has_the_users_callbacks_again_after_a_run(tmp_path: Path) -> None:
    """Within it, those that save checkpoints stay last, as in Lightning."""
    seen: list[list[str]] = []

    class Sees(L.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            seen.append([type(callback).__name__ for callback in trainer.callbacks])

    run = trainer(tmp_path, LoRACallback(CONFIG), ModelCheckpoint(tmp_path), Sees(), max_epochs=1)
    before = list(run.callbacks)
    run.fit(LitNet())
    assert run.callbacks == before
    assert seen == [["LoRACallback", "Sees", "Interruption", "DataPosition", "RandomNumbers", "ShownValues", "ModelCheckpoint"]]


def test_an_interruption_of_the_users_own_stays(tmp_path: Path) -> None:
    mine = Interruption()
    run = trainer(tmp_path, LoRACallback(CONFIG), mine, max_epochs=1)
    run.fit(LitNet())
    assert mine in run.callbacks


@pytest.mark.parametrize("merge", [True, False])
def test_a_module_is_freed_after_its_run(tmp_path: Path, merge: bool) -> None:
    """Many fits in one process would keep every model in memory."""

    def fit() -> weakref.ref[LitNet]:
        module = LitNet()
        trainer(tmp_path, LoRACallback(CONFIG, merge_on_fit_end=merge), max_epochs=1).fit(module)
        return weakref.ref(module)

    kept = fit()
    gc.collect()
    assert kept() is None


class BuiltInSetup(LitNet):
    """Builds its layers in ``setup``, as Lightning's documentation does."""

    def __init__(self) -> None:
        super().__init__(late=True)

    def setup(self, stage: str) -> None:
        if self.net is None:
            self.net = make_net()

    def configure_model(self) -> None:
        """Builds nothing."""


def test_a_model_that_is_built_in_setup_is_adapted(tmp_path: Path) -> None:
    module, saver = BuiltInSetup(), ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(tmp_path, LoRACallback(CONFIG, merge_on_fit_end=False), saver, max_epochs=1)
    run.fit(module)
    assert set(dict(lora_layers(module))) == {"net.fc1", "net.fc2"}
    assert "setup" not in vars(module) and "configure_model" not in vars(module)
    fresh = BuiltInSetup()
    trainer(tmp_path, LoRACallback(CONFIG), max_epochs=1).test(fresh, ckpt_path=saver.last_model_path, verbose=False)
    trained = dict(module.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in fresh.named_parameters() if "lora_" in name)


class ReplacedInSetup(LitNet):
    def setup(self, stage: str) -> None:
        assert self.net is not None
        self.net.fc2 = nn.Linear(32, 4)


class Empty(LitNet):
    def __init__(self) -> None:
        super().__init__(late=True)

    def configure_model(self) -> None:
        """Builds nothing."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (ReplacedInSetup, r"^ReplacedInSetup replaced 1 layer after adapting: net\.fc2\. Build layers in __init__ or"),
        (Empty, r"^Empty built no layers to adapt\. Build layers in __init__ or configure_model"),
    ],
)
def test_layers_that_are_gone_are_refused_before_the_first_step(tmp_path: Path, cls: Any, message: str) -> None:
    module = cls()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, LoRACallback(CONFIG), max_epochs=1).fit(module)
    assert module.losses == [] and not {"setup", "configure_model"} & set(vars(module))


class BuiltAnew(LitNet):
    """Does not look whether the model is there."""

    def __init__(self) -> None:
        super().__init__(late=True)

    def configure_model(self) -> None:
        self.net = make_net()


def test_a_model_that_is_built_anew_keeps_what_it_learnt(tmp_path: Path) -> None:
    """``configure_model`` is called before each stage: ``test`` after ``fit`` would be of fresh weights."""
    module, run = BuiltAnew(), trainer(tmp_path, LoRACallback(CONFIG), max_epochs=1)
    run.fit(module)
    trained = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"^BuiltAnew\.configure_model built the model anew, without the adapter of 'net\.fc1' \(2 of 2"):
        run.test(module, verbose=False)
    assert module.state_dict().keys() == trained.keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in module.state_dict().items())


def test_parts_deep_inside_are_put_back_too() -> None:
    module = nn.ModuleDict({"part": nn.ModuleDict({"net": apply_lora(make_net(), config=CONFIG)})})
    names = list(module.state_dict())
    with pytest.raises(ValueError, match=r"without the adapter of 'part.net.fc1'"), keeping_adapters(module):
        module["part"]["net"] = make_net()
    assert list(module.state_dict()) == names


def test_a_hook_of_the_instance_is_put_back(tmp_path: Path) -> None:
    """Also after a run that was refused."""
    module = LitNet()
    hook = module.configure_model = lambda: None  # type: ignore[method-assign]
    with pytest.raises(ValueError):
        trainer(tmp_path, LoRACallback(CONFIG), max_epochs=1).fit(module, ckpt_path=str(tmp_path / "none.ckpt"))
    assert vars(module)["configure_model"] is hook


def test_the_users_handler_of_sigterm_is_called(tmp_path: Path) -> None:
    called: list[int] = []
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))

    class Terminates(LitNet):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            signal.raise_signal(signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    try:
        with pytest.raises(SystemExit) as stop:
            trainer(tmp_path, LoRACallback(CONFIG), max_epochs=1).fit(Terminates())
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert stop.value.code == 143 and called


class Sized(LitNet):
    """Has a batch size to scale."""

    batch_size = 4

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.zeros(16, 8), torch.zeros(16, dtype=torch.long)), self.batch_size)


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("finder", [LearningRateFinder(num_training_steps=3, update_attr=False), BatchSizeFinder(max_trials=1)])
def test_a_tuner_before_the_run_is_no_resume(finder: L.Callback, tmp_path: Path, caplog: Any) -> None:
    """It restores the start from a checkpoint of its own, whose path Lightning keeps."""
    caplog.set_level(logging.INFO)
    folder = save_adapter(apply_lora(make_net(), CONFIG), tmp_path / "adapter")
    L.Trainer(
        default_root_dir=tmp_path,
        callbacks=[finder, LoRACallback(start_from=folder)],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    ).fit(Sized())
    assert f"Starts from the adapter {folder}" in caplog.text and "Resumes" not in caplog.text
