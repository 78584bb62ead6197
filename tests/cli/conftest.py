import gc

import pytest
import torch
import transformers
import yaml

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, save_adapter
from lightning_lora.cli.lightning_cli import LoRACLI
from tests import tiny_lm
from tests.parsers import share_parser


@pytest.fixture(autouse=True)
def lightning_on_todays_parser(monkeypatch):
    """LightningCLI 2.6 itself calls what jsonargparse has deprecated; there is no other call to make."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


@pytest.fixture(autouse=True, scope="module")
def no_classes_of_scripts():
    """jsonargparse imports each subclass of Callback, and those of a script that a test before ran cannot be imported."""
    gc.collect()


@pytest.fixture(autouse=True)
def one_parser(monkeypatch):
    make = LoRACLI.setup_parser

    def setup_parser(self, *args):
        own = not type(self).__module__.startswith("lightning_lora.")  # a test's own class
        make(self, *args) if self.command is None or own else share_parser(self, make, *args)

    monkeypatch.setattr(LoRACLI, "setup_parser", setup_parser)


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    """A picture takes 0.1 s, as long as a tiny run. `test_loss_picture.py` draws, and one test of `test_run_results.py`."""

    def empty(metrics, picture):
        picture.touch()
        return str(picture)

    monkeypatch.setattr("lightning_lora.cli.run_results.draw_loss", empty)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """An adapter that changes the answers."""
    network = apply_lora(transformers.AutoModelForCausalLM.from_pretrained(model), config=LoRAConfig(rank=4))
    torch.manual_seed(1)
    for parameter in get_lora_parameters(network):
        torch.nn.init.normal_(parameter)
    return str(save_adapter(network, tmp_path_factory.mktemp("adapters") / "adapter"))


@pytest.fixture
def config(model, tmp_path):
    """A whole run, in the flat form: no class_path where the defaults are meant."""
    files = {split: tiny_lm.write(tmp_path / f"{split}.jsonl", tiny_lm.rows(6)) for split in ("train", "val", "test")}
    content = {
        "model": {"model": model, "learning_rate": 1e-2},
        "data": {**files, "batch_size": 3},
        "lora": {"config": {"rank": 2}},
        "trainer": {
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "accelerator": "cpu",
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(tmp_path), "name": "run", "version": ""},
            },
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "run.yaml")
