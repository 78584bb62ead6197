"""`--lora.start_from` through the entry point."""

import logging

import pytest
import torch

from lightning_lora.cli.main import main


def test_fit_starts_from_an_adapter(adapter, config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert main(["fit", "--config", config, "--lora.config.rank=4", "--lora.start_from", adapter, "--model.learning_rate=1e-9"]) == 0
    assert f"Starts from the adapter {adapter}: its weights, with a new optimizer at step 0" in caplog.text
    (checkpoint,) = (tmp_path / "run").glob("checkpoints/*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {tuple(value.shape) for name, value in state.items() if name.endswith("lora_A")} == {(4, 32)}
    assert max(float(value.abs().max()) for name, value in state.items() if name.endswith("lora_B")) > 1  # the fixture's, not zeros


def test_test_runs_the_adapter(adapter, config, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    scores = []
    for options in ([], ["--lora.config.rank=4", "--lora.start_from", adapter]):
        assert main(["test", "--config", config, "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}", *options]) == 0
        assert ("which no adapter has changed" in caplog.text) == (not options)
        caplog.clear()
        scores.append(next(line for line in capsys.readouterr().out.splitlines() if "test_loss" in line))
    assert scores[0] != scores[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lora.start_from=none"], "there is no such adapter folder or checkpoint"),
        (["--lora.start_from="], "start_from='' is empty"),
        (["--lora.start_from={adapter}"], "rank of model.layers.0.self_attn.q_proj=2 (the adapter has 4)"),
    ],
)
def test_wrong_input_is_one_line(options, words, adapter, config, capsys):
    assert main(["fit", "--config", config, *(option.format(adapter=adapter) for option in options)]) in (1, 2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert words in line and "Traceback" not in line
