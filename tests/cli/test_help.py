"""`--help` and `--version`: quick, on a screen, and true to the parser."""

import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jsonargparse
import pytest
from lightning.pytorch import Trainer

from lightning_lora.callbacks import LoRACallback
from lightning_lora.cli import help as texts
from lightning_lora.cli.choice import DEFAULT_DATA, DEFAULT_TASK
from lightning_lora.cli.main import main
from lightning_lora.config import LoRAConfig

LAUNCHER = Path(__file__).parents[2] / "lightning_lora_command.py"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["fit", "--help"], ["predict", "-h"], ["sweep", "--help"]], ids=" ".join)
def test_help_imports_no_torch(words):
    code = (
        f"import sys, runpy; sys.argv[1:] = {words!r}\n"
        f"try: runpy.run_path({str(LAUNCHER)!r}, run_name='__main__')\n"
        "except SystemExit as stop: print(stop.code, {'torch', 'lightning', 'lightning_lora', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=LAUNCHER.parent)
    *output, last = done.stdout.splitlines()
    assert last == "0 set()" and output


def test_the_launcher_runs_the_same_commands(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(LAUNCHER.parent))
    import lightning_lora_command

    monkeypatch.setattr(sys, "argv", ["lightning-lora", "melt"])
    assert lightning_lora_command.main() == 2
    assert "no command 'melt'" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-lora {metadata.version('lightning-lora')}\n"


def test_the_package_runs_as_a_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["python -m lightning_lora", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("lightning_lora", run_name="__main__")
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("lightning-lora ")


@pytest.mark.parametrize("words", [[], *([command, "--help"] for command in (*texts.TRAIN, *texts.SWEEP, *texts.VERIFY))], ids=" ".join)
def test_help_fits_a_screen(words, capsys):
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 130


GROUPS = {"model": DEFAULT_TASK, "data": DEFAULT_DATA, "lora": LoRACallback, "lora.config": LoRAConfig, "trainer": Trainer}


def defaults():
    """Option → default, as the parser has them."""
    parser = jsonargparse.ArgumentParser()
    for prefix, cls in GROUPS.items():
        parser.add_class_arguments(cls, prefix, fail_untyped=False, skip={"config"} if prefix == "lora" else set())
    return {f"--{key}": value for key, value in _flat("", parser.get_defaults())}


def _flat(key, value):
    if isinstance(value, jsonargparse.Namespace):
        for name, inner in vars(value).items():
            yield from _flat(f"{key}.{name}".strip("."), inner)
    else:
        yield key, value


def test_the_common_options_and_their_defaults_are_the_parsers():
    there = defaults() | {"--model": DEFAULT_TASK.__name__, "--data": None, "--full_finetuning": False}
    for options in texts.COMMON.values():
        for name, default, what in options:
            value = there[name]
            shown = ", ".join(value) if isinstance(value, (tuple, list)) else {None: "", False: "false"}.get(value, str(value))
            assert (default, bool(what)) == (shown, True), name


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--model.help"], "Options of lightning_lora.tasks.CausalLMTask\n.*--model.learning_rate"),
        (["--data.help"], "Options of lightning_lora.data.InstructionDataModule\n.*--data.max_length"),
        (["--lora.help"], "--lora.merge_on_fit_end .*--lora.config.rank RANK"),
        (["--trainer.help"], "--trainer.max_epochs"),
        (["--model=tests.cli.test_lightning_cli.Head", "--model.help"], "--model.width"),
        (["--data.help", "tests.cli.test_lightning_cli.Data"], "--data.seed SEED"),
    ],
    ids=str,
)
def test_a_groups_help_lists_all_of_it(words, found, capsys):
    assert main(["fit", *words]) == 0
    output = capsys.readouterr().out
    assert re.search(found, output, re.DOTALL), output
    assert "``" not in output and ":class:" not in output


def test_help_all_lists_every_option(capsys):
    assert main(["fit", "--help-all"]) == 0
    output = capsys.readouterr().out
    assert "--trainer.detect_anomaly" in output and "--lora.cuda_graphs" in output and "--weights_only" in output


@pytest.mark.parametrize("command", texts.TOOLS)
def test_every_command_has_a_help_with_its_arguments(command, capsys):
    assert main([command, "--help"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: lightning-lora {command} ") and "--config" in output
