"""A progress bar on a GPU reads its values twice a second; what it shows in the end is the last value."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_lora import LoRACallback
from lightning_lora.callbacks import shown_values
from lightning_lora.callbacks.shown_values import ShownValues
from tests.lit import CONFIG, LitNet

BATCHES = 4  # an epoch of LitNet


class Shows(LitNet):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("shown", loss, prog_bar=True)
        return loss


class Quiet(LitNet):
    """Reads no value itself: its losses are tensors."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.step(batch)
        self.losses.append(loss.detach())  # type: ignore[arg-type]
        self.log("shown", loss, prog_bar=True)
        return loss


class Clock:
    """Moves on by some seconds with each batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: float) -> None:
        self.now, self.step = 100.0, step
        monkeypatch.setattr(shown_values.time, "monotonic", lambda: self.now)


def bar_of(kind: type, clock: Clock) -> Any:
    class Bar(kind):  # type: ignore[misc]
        """Notes each time its values are read, and the last loss shown."""

        reads, shown = 0, 0.0

        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            self.reads += 1
            found: dict[str, Any] = super().get_metrics(trainer, pl_module)
            self.shown = float(found["shown"])
            return found

        def on_train_batch_end(self, *args: Any) -> None:
            clock.now += clock.step
            super().on_train_batch_end(*args)

    return Bar()


def run(
    tmp_path: Path, bar: Any, *, elsewhere: bool, monkeypatch: pytest.MonkeyPatch, module: LitNet | None = None, **options: Any
) -> LitNet:
    start = ShownValues.on_train_start

    def on_train_start(self: ShownValues, trainer: Any, pl_module: Any) -> None:
        with monkeypatch.context() as patched:
            if elsewhere:  # the values are here, but it is told that they are not
                patched.setattr(type(trainer.strategy), "root_device", torch.device("meta"))
            start(self, trainer, pl_module)

    monkeypatch.setattr(ShownValues, "on_train_start", on_train_start)
    module, lora = module or Shows(), LoRACallback(CONFIG, **options)
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=[lora, *([bar] if bar else [])], max_epochs=2, logger=False,
        enable_checkpointing=False, limit_val_batches=0, enable_model_summary=False, enable_progress_bar=bar is not None,
    )  # fmt: skip
    trainer.fit(module)
    assert bar is None or "get_metrics" not in vars(bar)
    assert "on_batch_end" not in vars(trainer._logger_connector)
    pickle.dumps(lora)
    return module


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers", "ignore:The number of training batches")
@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
@pytest.mark.parametrize(("seconds", "skipped"), [(0.0, 5), (0.3, 3), (1.0, 0)])
def test_values_are_read_every_half_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, seconds: float, skipped: int
) -> None:
    """Within an epoch; the last batch of an epoch, and its end, are read in any case."""
    reads = []
    for options in ({}, {"tune_loop": False}):
        bar = bar_of(kind, Clock(monkeypatch, seconds))
        module = run(tmp_path, bar, elsewhere=True, monkeypatch=monkeypatch, **options)
        assert bar.shown == pytest.approx(module.losses[-1])
        reads.append(bar.reads)
    assert reads == [10 - skipped, 10]  # two epochs of four batches, and their ends


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers", "ignore:The number of training batches")
@pytest.mark.parametrize("shows", [True, False])
def test_steps_read_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shows: bool) -> None:
    """Lightning reads what is logged for the bar after every batch, with or without a bar. Loggers get every value they ask for."""
    reads: list[int] = []
    item = torch.Tensor.item

    def counted(self: torch.Tensor) -> Any:
        reads.append(0)
        return item(self)

    monkeypatch.setattr(torch.Tensor, "item", counted)
    counts = {}
    for tuned in (True, False):
        reads.clear()
        bar = bar_of(TQDMProgressBar, Clock(monkeypatch, 0.0)) if shows else None
        module = run(tmp_path, bar, elsewhere=True, monkeypatch=monkeypatch, module=Quiet(), tune_loop=tuned)
        counts[tuned] = len(reads)
        assert module.trainer.progress_bar_metrics["shown"] == float(module.losses[-1])
        assert module.trainer.callback_metrics["shown"] == module.losses[-1]
    # Two epochs: Lightning reads after three of four batches less; the bar before five of ten shows.
    assert counts[False] - counts[True] == 2 * 3 + 5 * shows


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers", "ignore:The number of training batches")
def test_on_a_cpu_values_are_read_in_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = bar_of(TQDMProgressBar, Clock(monkeypatch, 0.0))
    run(tmp_path, bar, elsewhere=False, monkeypatch=monkeypatch)
    assert bar.reads >= 2 * BATCHES
