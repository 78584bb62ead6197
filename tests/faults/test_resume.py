"""Checkpoints: interruptions, resuming with something else, files of strangers."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback, LoRAConfig, load_adapter
from tests.faults.kit import case, disk_bits, refused, row
from tests.lit import CONFIG as FC
from tests.lit import LitNet, trainer


def run(folder: Path, *callbacks: L.Callback, epochs: int = 2, ckpt: Path | str | None = None, config: LoRAConfig = FC) -> LitNet:
    torch.manual_seed(0)
    model = LitNet()
    trainer(folder, LoRACallback(config, merge_on_fit_end=False), *callbacks, max_epochs=epochs).fit(model, ckpt_path=ckpt)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The checkpoint of one epoch."""
    run(tmp_path / "saved", ModelCheckpoint(tmp_path / "saved", filename="c"), epochs=1)
    return tmp_path / "saved" / "c.ckpt"


class Signal(L.Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 5:
            os.kill(os.getpid(), self.number)


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@row(35)
def test_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    """Leaves a checkpoint that goes on with the next step, and the exit code that shells expect."""
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, Signal(number), ModelCheckpoint(tmp_path, filename="c"))
    assert caught.value.code == 128 + number
    newest = max(tmp_path.glob("*.ckpt"), key=os.path.getmtime)
    assert torch.load(newest, weights_only=True)["global_step"] in (5, 6)


class Requeue(L.Callback):
    """Saves what Lightning saves when SLURM takes the machine away, and stops."""

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(os.path.join(trainer.default_root_dir, "hpc_ckpt_1.ckpt"))
        raise KeyboardInterrupt


@row(36)
def test_slurm_requeue(tmp_path: Path) -> None:
    """Lightning finds the file by its name; on SLURM it does so without a ``ckpt_path``."""
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path, Requeue())
    file = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    names = {name for name in file["state_dict"] if "lora_" not in name}
    assert names == {f"net.norm.{part}" for part in ("running_mean", "running_var", "num_batches_tracked")}
    assert run(tmp_path, ckpt="hpc").losses == run(tmp_path / "whole").losses[4:]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        case(39, "rank", {"rank": 4}, "rank: 2 != 4"),
        case(39, "targets", {"target_modules": ["fc1"]}, "target_modules"),
        case(39, "variant", {"variant": "dora"}, "variant: "),
        case(40, "alpha", {"alpha": 8}, "alpha: 4.0 != 8.0"),
    ],
)
def test_resume_with_another_config(tmp_path: Path, saved: Path, fields: dict[str, Any], said: str) -> None:
    model = LitNet()
    with refused(str(saved), "another LoRA config", said, model=model.net, folder=tmp_path):
        lora = LoRACallback(LoRAConfig(**{**FC.to_dict(), **fields}))
        trainer(tmp_path, lora, max_epochs=2).fit(model, ckpt_path=saved)


@row(43)
def test_a_checkpoint_without_the_callback(tmp_path: Path, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    """None of our code runs then: Lightning and torch refuse it. `load_adapter` reads it, and the log of the training said so."""
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*Unexpected key.*lora_A"):
        LitNet.load_from_checkpoint(saved, weights_only=True)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*Unexpected key.*lora_A"):
        trainer(tmp_path, max_epochs=2).test(LitNet(), ckpt_path=saved, verbose=False)
    before = disk_bits(tmp_path)
    with caplog.at_level("INFO"):
        model = run(tmp_path / "again", ModelCheckpoint(tmp_path / "again"), epochs=1)
    assert "not with load_from_checkpoint" in caplog.text and 'load_adapter(model, "x.ckpt")' in caplog.text
    loaded = load_adapter(LitNet(), saved)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert {name: value for name, value in disk_bits(tmp_path).items() if not name.startswith("again")} == before


class Spy:
    """Pickled, it is a call that makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def spied(saved: Path) -> Path:
    file = saved.with_name("evil.ckpt")
    torch.save({**torch.load(saved, weights_only=True), "more": Spy(saved.with_name("ran"))}, file)
    return file


@row(57)
def test_a_checkpoint_with_code_that_load_adapter_reads(saved: Path) -> None:
    model = LitNet()
    with refused("evil.ckpt", "not a readable checkpoint", model=model):
        load_adapter(model, spied(saved))
    assert not saved.with_name("ran").exists()


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@row(57)
def test_a_checkpoint_with_code(tmp_path: Path, saved: Path, stage: str) -> None:
    """Of Lightning's ``ckpt_path``: whatever the exception is, nothing runs."""
    model = LitNet()
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        getattr(trainer(tmp_path, LoRACallback(FC), max_epochs=2), stage)(model, ckpt_path=spied(saved))
    assert not saved.with_name("ran").exists()


@row(57)
def test_a_folder_of_shards_with_code(tmp_path: Path) -> None:
    folder = tmp_path / "epoch=3.ckpt"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Spy(tmp_path / "ran")))
    torch.save({}, folder / "meta.pt")
    model = LitNet()
    with pytest.raises(ValueError, match="epoch=3"):
        trainer(tmp_path, LoRACallback(FC), max_epochs=1).test(model, ckpt_path=folder, weights_only=True, verbose=False)
    assert not (tmp_path / "ran").exists()


@row(57)
def test_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is asked for."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: asked.append(args))
    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io.pl_load", lambda path, **kwargs: asked.append(path))
    model, url = LitNet(), "http://127.0.0.1:9/x.ckpt"
    with refused(url, "URL", model=model.net, folder=tmp_path):
        trainer(tmp_path, LoRACallback(FC), max_epochs=1).fit(model, ckpt_path=url)
    assert not asked
