"""What a checkpoint says to Lightning: refused in one line before the module is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import LoRACallback, load_adapter
from tests.faults.kit import refused
from tests.lit import CONFIG, LitNet, trainer

PROGRESS = ("loops", "fit_loop", "epoch_loop.batch_progress")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run = trainer(folder, LoRACallback(CONFIG, merge_on_fit_end=False), max_epochs=1)
    run.fit(LitNet())
    run.save_checkpoint(folder / "whole.ckpt")
    run.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    return folder


def put(*keys: Any, value: Any = ...) -> Callable[[dict[str, Any]], None]:
    """Set a place in nested mappings; without a value, remove it."""

    def edit(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        if value is ...:
            del content[keys[-1]]
        else:
            content[keys[-1]] = value

    return edit


def resume(folder: Path, path: Path, model: LitNet, **kwargs: Any) -> None:
    trainer(folder, LoRACallback(CONFIG, merge_on_fit_end=False), max_epochs=2, **kwargs).fit(model, ckpt_path=path)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (put("pytorch-lightning_version"), "pytorch-lightning_version is None"),
        (put("pytorch-lightning_version", value="new"), "pytorch-lightning_version is 'new'"),
        (put("callbacks", value=[1]), "callbacks is [1]"),
        (put("loops", value=3), "loops is 3"),
        (put("loops", "fit_loop"), "loops['fit_loop'] is None"),
        (put("loops", "fit_loop", "state_dict", value=[]), "loops['fit_loop'] is {"),
        (put(*PROGRESS, "total"), "['total'] is None"),
        (put(*PROGRESS, "current", "ready", value=-1), "['current']['ready'] is -1"),
        (put(*PROGRESS, "current", "ready", value=True), "['ready'] is True"),
        (put(*PROGRESS, "current", "ready", value=2**70), "['ready'] is 118"),
        (put(*PROGRESS, "is_last_batch", value="x"), "['is_last_batch'] is 'x'"),
        (put("lr_schedulers", value=[None]), "lr_schedulers is [None]"),
        (put("optimizer_states", 0, "param_groups", value=1), "optimizer_states are not"),
        (put("optimizer_states", 0, "param_groups", 0, "params", value=[[]]), "optimizer_states are not"),
        (put("optimizer_states", 0, "state", "net.fc1.lora_A", value=1), "'net.fc1.lora_A' is of type int"),
    ],
)
def test_a_field_that_lightning_would_trust(saved: Path, tmp_path: Path, edit: Any, said: str) -> None:
    content = torch.load(saved / "whole.ckpt", weights_only=True)
    edit(content)
    torch.save(content, tmp_path / "x.ckpt")
    with refused(str(tmp_path / "x.ckpt"), said):
        resume(tmp_path, tmp_path / "x.ckpt", LitNet())


def test_counts_of_another_version_are_left_to_lightning(saved: Path, tmp_path: Path) -> None:
    content = torch.load(saved / "whole.ckpt", weights_only=True)
    put("pytorch-lightning_version", value="2.5.0")(content)
    put(*PROGRESS, "is_last_batch", value=0)(content)
    torch.save(content, tmp_path / "x.ckpt")
    model = LitNet()
    resume(tmp_path, tmp_path / "x.ckpt", model)
    assert len(model.losses) == 4


def test_a_checkpoint_of_weights_only(saved: Path, tmp_path: Path) -> None:
    """No training resumes from it; tests run with it, and its adapter loads."""
    path = saved / "weights.ckpt"
    with refused(str(path), "save_weights_only=True", "load_adapter(model, path)"):
        resume(tmp_path, path, LitNet())
    trainer(tmp_path, LoRACallback(CONFIG)).test(LitNet(), ckpt_path=path, verbose=False)
    assert load_adapter(LitNet(), path).net.fc1.lora_B.any()
