"""What a completed fit leaves and says: an adapter folder, a picture, commands that run; and a config that gives the same again."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from jsonargparse import Namespace
from safetensors.torch import load_file

from lightning_lora import load_adapter
from lightning_lora.cli.loss_picture import draw_loss
from lightning_lora.cli.main import main
from lightning_lora.cli.run_results import LOGGER, log_under_root
from tests import tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:Checkpoint directory")


@pytest.fixture
def versions(config):
    """The run of `config`, with a new folder for each run."""
    content = yaml.safe_load(Path(config).read_text())
    content["trainer"]["logger"]["init_args"]["version"] = None
    Path(config).write_text(yaml.safe_dump(content))
    return config


def fit(capsys, config, *words):
    assert main(["fit", "--config", config, "--json", *words]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_the_adapter_is_that_of_the_last_step_and_the_commands_run(config, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning_lora.cli.run_results.draw_loss", draw_loss)
    report = fit(capsys, config, "--trainer.max_epochs=2")
    (adapter,), (checkpoint,) = report["adapter"], report["checkpoints"]
    assert adapter == str(tmp_path / "run" / "adapter") and Path(report["loss_picture"]).read_bytes()[:4] == b"\x89PNG"
    assert {"train_loss", "val_loss", "val_accuracy"} <= report["last"].keys()
    ids = torch.arange(4, 14)[None]
    mine, theirs = (
        load_adapter(transformers.AutoModelForCausalLM.from_pretrained(model), each)(ids).logits for each in (adapter, checkpoint)
    )
    assert torch.equal(mine, theirs)
    commands = [shlex.split(command)[1:] for command in report["next"]]
    assert [words[0] for words in commands] == ["generate", "chat", "merge", "export", "test"]
    for words in commands:
        if words[0] != "chat":
            assert main(words) == 0, words
    assert Path(tmp_path, "run", "merged", "config.json").is_file() and Path(tmp_path, "run", "vllm", "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("words", "proposed"),
    [
        (["--lora.config.trainable_token_indices=[3, 5]"], ["generate", "chat", "merge", "export", "test"]),  # for peft
        (["--lora.config.variant=lora_bias", "--lora.merge_on_fit_end=false"], ["generate", "chat", "export", "test"]),
        (["--lora.config.init=loftq", "--lora.quantize=fp8"], ["generate", "chat", "merge", "test"]),
    ],
    ids=["rows", "lora_bias", "loftq"],
)
def test_no_command_is_proposed_that_refuses_the_adapter(config, words, proposed, capsys):
    commands = [shlex.split(command)[1:] for command in fit(capsys, config, *words, "--trainer.max_epochs=1")["next"]]
    assert [each[0] for each in commands] == proposed
    for each in commands:
        if each[0] != "chat":
            assert main(each) == 0, each


def test_for_people_there_is_a_list_and_no_json(config, tmp_path, capsys):
    assert main(["fit", "--config", config, "--trainer.enable_progress_bar=false"]) == 0
    output = capsys.readouterr().out
    assert ["adapter", str(tmp_path / "run" / "adapter")] in [line.split() for line in output.splitlines()]
    assert "\nnext:\n  lightning-lora generate " in output and "\x1b" not in output and "{" not in output


def test_a_run_gives_the_same_again_from_the_config_that_it_left(versions, tmp_path, capsys):
    first = fit(capsys, versions, "--lora.config.rank=3", "--model.learning_rate=3e-2")
    again = fit(capsys, first["config"])
    assert first["folder"] != again["folder"] and first["last"] == again["last"]
    assert Path(first["metrics"]).read_text() == Path(again["metrics"]).read_text()
    mine, theirs = (load_file(Path(report["adapter"][0], "adapter_model.safetensors")) for report in (first, again))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    saved = yaml.safe_load(Path(first["folder"], "hparams.yaml").read_text())["config"]
    assert saved["lora"]["config"]["rank"] == 3 and saved["trainer"]["max_epochs"] == 1 and saved["seed_everything"] == 1


def test_an_earlier_adapter_stays(config, tmp_path, capsys):
    fit(capsys, config)
    before = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    report = fit(capsys, config, "--model.learning_rate=0.1")
    assert report["adapter"] == [str(tmp_path / "run" / "adapter-v1")]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_known_before_the_first_step(config, tmp_path, capsys, monkeypatch):
    from lightning_lora.cli import run_results

    def refuse(folder, size, name):
        assert size > 0
        raise ValueError(f"{name}={str(folder)!r} cannot be written to")

    monkeypatch.setattr(run_results, "check_room", refuse)
    assert main(["fit", "--config", config]) == 2
    assert "the run's folder=" in capsys.readouterr().err and not list(tmp_path.rglob("*.ckpt")) and not (tmp_path / "run").exists()


def test_a_full_fine_tune_is_merged_and_answers_from_its_checkpoint(config, model, tmp_path, capsys):
    report = fit(capsys, config, "--full_finetuning=true")
    assert report["adapter"] == [] and report["next"]
    words = shlex.split(next(command for command in report["next"] if " merge " in command))[1:]
    assert main(words) == 0
    saved = torch.load(report["checkpoints"][0], weights_only=True)["state_dict"]
    merged = transformers.AutoModelForCausalLM.from_pretrained(words[3]).state_dict()
    assert merged.keys() == {name.removeprefix("model.") for name in saved} and all(
        torch.equal(tensor, saved[f"model.{name}"]) for name, tensor in merged.items()
    )
    answers = []
    capsys.readouterr()
    for options in ([model, "--adapter", report["checkpoints"][0]], [words[3]]):
        assert main(["generate", options[0], "which colour", "--max_new_tokens=5", *options[1:]]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    other = tmp_path / "other"
    tiny_lm.llama(len(tiny_lm.WORDS) + 1).save_pretrained(other)
    tiny_lm.tokenizer().save_pretrained(other)
    assert main(["merge", str(other), report["checkpoints"][0], str(tmp_path / "no")]) == 2
    assert "is a full fine-tune of another model: they differ in " in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_adaloras_adapter_has_the_ranks_that_it_ended_with(config, tmp_path, capsys):
    own = {"target_rank": 2, "init_rank": 4, "config": {"target_modules": ["v_proj"], "alpha": 4}}
    callback = json.dumps([{"class_path": "lightning_lora.AdaLoRACallback", "init_args": own}])
    content = yaml.safe_load(Path(config).read_text())
    del content["lora"]
    Path(config).write_text(yaml.safe_dump(content))
    report = fit(capsys, config, f"--trainer.callbacks={callback}", "--trainer.max_epochs=2")
    ranks = [
        tensor.shape[0] for name, tensor in load_file(Path(report["adapter"][0], "adapter_model.safetensors")).items() if "lora_A" in name
    ]
    assert len(ranks) == 2 and sum(ranks) == 4


def test_no_results_of_a_fast_dev_run(config, tmp_path, capsys):
    assert main(["fit", "--config", config, "--trainer.fast_dev_run=true"]) == 0
    assert "next:" not in capsys.readouterr().out and not (tmp_path / "run" / "adapter").exists()


def test_metrics_as_json(config, capsys):
    assert main(["test", "--config", config, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert {"test_loss", "test_accuracy", "test_perplexity"} <= json.loads(line).keys()


@pytest.mark.parametrize(
    ("root", "changed", "found"),
    [("mine", {}, "mine"), (None, {}, "runs"), ("mine", {"save_dir": "logs"}, "logs"), ("mine", {"name": "other"}, "runs")],
)
def test_the_usual_logger_writes_under_a_root_that_is_given(root, changed, found):
    logger = Namespace(class_path=LOGGER["class_path"], init_args=Namespace(**{**LOGGER["init_args"], **changed}))
    log_under_root(Namespace(default_root_dir=root, logger=logger))
    assert logger.init_args.save_dir == found
    log_under_root(Namespace(default_root_dir=root, logger=False))
