"""The YAML blocks and command lines of all pages go through the real parsers. None can be skipped."""

from __future__ import annotations

import functools
import re
import shlex
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

from lightning_lora import LoRAConfig
from lightning_lora.cli import commands, inspect_rows, main, sweep
from lightning_lora.cli.lightning_cli import LoRACLI
from tests.docs.pages import PAGES, ROOT, blocks
from tests.parsers import share_parser

CONFIGS = [(page, number) for page in PAGES for number in range(len(blocks(page, "yaml")))]


def command_lines() -> list[str]:
    """Every command line of the bash blocks of all pages, once."""
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))))


class ParseOnly(LoRACLI):
    """The command line's parser, without what follows: no model is made and nothing runs."""

    def setup_parser(self, *args: Any) -> None:
        share_parser(self, LoRACLI.setup_parser, *args)

    def _set_seed(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def parsed(*words: str) -> Any:
    """The configuration of a training command."""
    return ParseOnly(args=list(words)).config[words[0]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, but for `run.yaml`, the command line's page's own, and the repository's `configs`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI 2.6 itself calls what is deprecated there
    (tmp_path / "run.yaml").write_text(blocks("command-line", "yaml")[0])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


@pytest.mark.parametrize(("page", "number"), CONFIGS)
def test_yaml_is_a_config(folder: Path, page: str, number: int) -> None:
    """The parser knows every key and accepts every value; what the file says of LoRA makes a valid config."""
    file, text = folder / "block.yaml", blocks(page, "yaml")[number]
    file.write_text(text)
    config = parsed("fit", "--config", str(file))
    assert LoRAConfig(**config.lora.config.as_dict()) != LoRAConfig()
    file.write_text(text.replace("lora:", "lora:\n  colour: blue"))
    with pytest.raises(Exception, match="colour"):  # and would know a wrong one
        parsed("fit", "--config", str(file))


@pytest.mark.parametrize("line", command_lines())
def test_command_lines(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """make's targets are in the Makefile, scripts are in the repository, and our own commands take these options."""
    program, *rest = shlex.split(line)
    if program == "make":
        assert set(rest) <= targets() and rest
    elif program == "python":
        file = rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else rest[0]
        assert (ROOT / file).is_file()
    elif program == "lightning-lora" and rest[0] in {*main.TRAIN, *main.VERIFY}:
        assert parsed(*("fit" if word in main.VERIFY else word for word in rest))
    elif program == "lightning-lora" and rest[0] in main.SWEEP:
        trials = folder / "trials.yaml"
        trials.write_text("- {rank: 2}\n")
        described, left = sweep.take_settings([str(trials) if word == trials.name else word for word in sweep.own_options(rest[1:])[1]])
        assert all(parsed("fit", *left, *each.options()) for each in described)
    elif rest[0] == "inspect" and (run := inspect_rows.run_words(rest[1:])) is not None:
        assert parsed("fit", *run)
    elif program == "lightning-lora":
        called: dict[str, Any] = {}
        original = getattr(commands, rest[0])
        monkeypatch.setattr(commands, rest[0], functools.wraps(original)(lambda **arguments: called.update(arguments)))
        assert main.main(rest) == 0, capsys.readouterr().err
        written = [word for word in rest[1:] if not word.startswith("--")]
        called |= {name: field for value in called.values() if is_dataclass(value) for name, field in vars(value).items()}
        values = {str(value) for value in called.values()} | {str(getattr(called.get("lora"), "target_modules", ""))}
        assert written and set(written) <= values, "what was written arrived"
    else:
        assert [program, rest[0]] == ["pip", "install"], "a command that this test does not know"


def targets() -> set[str]:
    return {name for line in re.findall(r"^([\w ]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE) for name in line.split()}


@pytest.mark.parametrize("page", PAGES)
def test_commands_named_in_the_text_exist(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`make (\w+)", text)) <= targets()
    named = {name for group in re.findall(r"`lightning-lora ([\w|]+)", text) for name in group.split("|")}
    assert named <= {*main.TRAIN, *main.SWEEP, *main.VERIFY, *main.TOOLS}
    scripts = re.findall(r"`(?:torchrun [^`]*|python )((?:benchmarks|examples)/\S+\.py)", text)
    assert not [script for script in scripts if not (ROOT / script).is_file()]
