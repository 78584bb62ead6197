"""Checkpoints, folders and YAML of several trials in one ``fit``."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, Trials, get_lora_parameters, load_adapter
from tests.trials.lit import CONFIG, GIVEN, STOPPING, Lit, alone, fit, loaders, resumable, same

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*in your `training_step`")


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
