"""``learning_rate: auto`` through the command line: what the optimizer gets, and what the log says."""

import logging

import pytest

from lightning_lora.cli.lightning_cli import LoRACLI
from lightning_lora.cli.main import main
from tests import tiny_lm
from tests.cli.conftest import lightning_on_todays_parser  # noqa: F401 (a fixture that is always on)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("model"))


def rates(model, folder, *options):
    """The learning rates of a run's groups, before its schedule."""
    data = tiny_lm.write(folder / "train.jsonl", tiny_lm.rows(4))
    quiet = ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar")
    args = [f"--model.model={model}", "--model.warmup=0", "--model.schedule=constant"]
    args += [f"--data.train={data}", f"--data.val={data}", "--data.batch_size=2", *(f"--trainer.{name}=false" for name in quiet)]
    args += [
        f"--trainer.default_root_dir={folder}",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
        "--trainer.num_sanity_val_steps=0",
    ]
    cli = LoRACLI([*args, *options], run=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    return [group["lr"] for group in cli.trainer.optimizers[0].param_groups]


FULL = 5e-5 * (2000 / 32) ** 0.781  # of the tiny model's width


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--model.learning_rate=auto"], [FULL * 15 * 2]),  # two steps; alpha 16
        (["--model.learning_rate=auto", "--lora.lora_plus_ratio=16"], [FULL * 15 * 2 / 16, FULL * 15 * 2]),
        (["--model.learning_rate=auto", "--full_finetuning=true"], [FULL]),
        (["--model.learning_rate=3e-4"], [3e-4]),
        ([], [1e-3]),
    ],
)
def test_the_optimizer_gets_it(options, wanted, model, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert rates(model, tmp_path, *options) == pytest.approx(wanted, rel=0.05)
    assert ("learning_rate: " in caplog.text and "width 32" in caplog.text) == ("--model.learning_rate=auto" in options)
    if "--full_finetuning=true" not in options:
        assert "effective batch: 2 rows." in caplog.text and "target_modules: 4 of 15 linear layers" in caplog.text


def test_another_word_is_refused(model, capsys):
    assert main(["fit", f"--model.model={model}", "--model.learning_rate=aut", "--data.train=x.jsonl"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.learning_rate" in line and "auto" in line and "aut" in line
