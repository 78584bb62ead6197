"""A training that turns NaN stops, the last good checkpoint survives, and none is resumed from NaN unless asked to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback
from lightning_lora.strategies import finite
from tests.lit import CONFIG, LitNet, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Be aware that when using `ckpt_path`")


class Diverges(LitNet):
    """The loss is NaN from a step on."""

    def __init__(self, step: int = 6) -> None:
        super().__init__()
        self.step_of_nan = step

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step >= self.step_of_nan else loss


def lora(**options: Any) -> LoRACallback:
    return LoRACallback(CONFIG, merge_on_fit_end=False, **options)


def saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="c", save_last=True, every_n_train_steps=1, enable_version_counter=False)


def finite_file(path: Path) -> tuple[int, bool]:
    content = torch.load(path, weights_only=True)
    return content["global_step"], all(bool(value.isfinite().all()) for value in content["state_dict"].values())


def test_the_last_good_checkpoint_survives(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"training stops and writes no checkpoint: net\.fc1\.lora_A holds NaN or infinity \(4 of 4"):
        trainer(tmp_path, lora(), saving(tmp_path), max_epochs=3).fit(Diverges())
    assert {path.name: finite_file(path) for path in tmp_path.glob("*.ckpt")} == {"c.ckpt": (6, True), "last.ckpt": (6, True)}
    module = LitNet()
    with pytest.warns(UserWarning, match="ended before the epoch ended"):  # Lightning's
        trainer(tmp_path, lora(), max_epochs=3).fit(module, ckpt_path=tmp_path / "last.ckpt")
    assert len(module.losses) == 6 and all(torch.tensor(module.losses).isfinite())


@pytest.mark.parametrize(("every", "steps"), [(1, 7), (4, 8), (50, 12)])
def test_it_stops_without_checkpoints_too(tmp_path: Path, every: int, steps: int) -> None:
    module = Diverges()
    with pytest.raises(RuntimeError, match="training stops"):
        trainer(tmp_path, lora(), max_epochs=3, log_every_n_steps=every).fit(module)
    assert len(module.losses) == steps


def test_resuming_from_nan_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, lora(allow_nonfinite=True), saving(tmp_path), max_epochs=3)
    run.fit(Diverges())  # the switch: it goes on
    assert finite_file(tmp_path / "last.ckpt") == (12, False)
    for act in ("fit", "test", "validate"):
        module = LitNet()
        with pytest.raises(ValueError, match=r"last\.ckpt: net\.fc\S+ holds NaN or infinity \(4 tensors do\).*allow_nonfinite=True"):
            getattr(trainer(tmp_path, lora(), max_epochs=4), act)(module, ckpt_path=tmp_path / "last.ckpt")
    module = LitNet()
    trainer(tmp_path, lora(allow_nonfinite=True), max_epochs=4).fit(module, ckpt_path=tmp_path / "last.ckpt")
    assert len(module.losses) == 4


class Spoilt(LitNet):
    """The first moments become NaN, or infinity a second one, in the last batch. No parameter is."""

    value = float("nan")
    slot = "exp_avg"

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if batch_idx == 3:
            for state in optimizer.state.values():
                state[self.slot].fill_(self.value)


class Overflown(Spoilt):
    value = float("inf")
    slot = "exp_avg_sq"


def test_nan_in_the_optimizer_alone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no checkpoint: the optimizer state of net\.fc1\.lora_A holds NaN \(that of 4 parameters does"):
        trainer(tmp_path, lora(), saving(tmp_path), max_epochs=1).fit(Spoilt())
    assert finite_file(tmp_path / "last.ckpt") == (3, True)
    trainer(tmp_path, lora(allow_nonfinite=True), saving(tmp_path), max_epochs=1).fit(Spoilt())
    module = LitNet()
    with pytest.raises(
        ValueError, match=r"last\.ckpt: the optimizer state of net\.fc1\.lora_A holds NaN \(that of 4 .*allow_nonfinite=True"
    ):
        trainer(tmp_path, lora(), max_epochs=2).fit(module, ckpt_path=tmp_path / "last.ckpt")
    trainer(tmp_path, lora(), max_epochs=2).test(module, ckpt_path=tmp_path / "last.ckpt")  # which uses no optimizer state


def test_a_second_moment_may_overflow(tmp_path: Path) -> None:
    trainer(tmp_path, lora(), saving(tmp_path), max_epochs=1).fit(Overflown())
    module = LitNet()
    trainer(tmp_path, lora(), max_epochs=2).fit(module, ckpt_path=tmp_path / "last.ckpt")
    assert len(module.losses) == 4


def test_buffers_may_hold_infinity(tmp_path: Path) -> None:
    class Masked(LitNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((3,), -float("inf")))

    trainer(tmp_path, lora(), saving(tmp_path), max_epochs=1).fit(Masked())
    module = Masked()
    trainer(tmp_path, lora(), max_epochs=2).fit(module, ckpt_path=tmp_path / "last.ckpt")
    assert len(module.losses) == 4


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each look read: what waits for a device."""
    counted: list[int] = []
    original: Callable[..., Any] = finite.nonfinite

    def nonfinite(tensors: Any) -> Any:
        counted.append(len(tensors))
        return original(tensors)

    monkeypatch.setattr(finite, "nonfinite", nonfinite)
    return counted


def test_a_sound_training_is_looked_at_no_more_than_lightning_logs(tmp_path: Path, looks: list[int]) -> None:
    trainer(tmp_path, lora(), max_epochs=3, log_every_n_steps=5).fit(LitNet())
    assert looks == [4, 4, 4]  # after 5 and 10 of 12 batches, and at the end
    looks.clear()
    trainer(tmp_path, lora(allow_nonfinite=True), saving(tmp_path), max_epochs=3, log_every_n_steps=1).fit(LitNet())
    assert looks == []
