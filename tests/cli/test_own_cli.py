"""A user's own LightningCLI, with LoRACallback among the trainer's callbacks."""

import sys

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule

from lightning_lora import LoRACallback
from tests.cli.test_lightning_cli import OWN, Head


@pytest.fixture
def own_cli(tmp_path, monkeypatch):
    """Return a function that fits with a user's own LightningCLI, whose YAML has the callback, and more options."""
    callback = {"class_path": "lightning_lora.LoRACallback", "init_args": {"config": {"rank": 2, "target_modules": ["layer"]}}}
    callback["init_args"]["merge_on_fit_end"] = False
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    arguments = ["fit", "--config", str(tmp_path / "own.yaml"), f"--trainer.default_root_dir={tmp_path}", *OWN]
    monkeypatch.setattr(sys, "argv", ["own"])
    return lambda *more: LightningCLI(Head, BoringDataModule, args=[*arguments, *more], seed_everything_default=0)


def test_a_users_own_lightning_cli_takes_the_callback_from_yaml(own_cli):
    cli = own_cli()
    assert any(isinstance(callback, LoRACallback) for callback in cli.trainer.callbacks)
    assert cli.model.layer.lora_A.shape == (2, 32) and cli.model.layer.lora_B.abs().max() > 0


@pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden")
def test_a_users_own_lightning_cli_builds_the_optimizer_before_lora(own_cli):
    cli = own_cli(
        "--optimizer=torch.optim.SGD",
        "--optimizer.lr=0.1",
        "--lr_scheduler=torch.optim.lr_scheduler.ExponentialLR",
        "--lr_scheduler.gamma=0.5",
    )
    (group,) = cli.trainer.optimizers[0].param_groups
    assert [id(p) for p in group["params"]] == [id(cli.model.layer.lora_A), id(cli.model.layer.lora_B)]
    assert cli.model.layer.lora_B.abs().max() > 0 and group["lr"] < 0.1
