"""List all options of a group or a command, from signatures and docstrings: ``--model.help``, ``--trainer.help``, ``merge --help``."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Optional

from docstring_parser import parse
from jsonargparse import ActionConfigFile, ArgumentParser
from lightning.pytorch import Trainer

from lightning_lora.callbacks import LoRACallback
from lightning_lora.cli.choice import chosen_data, chosen_task, class_path
from lightning_lora.cli.messages import arguments_of, check_not_null
from lightning_lora.config import LoRAConfig

# Group → prefix of its options → the class that they are arguments of, for a command line.
GROUPS: dict[str, Callable[[Sequence[str]], dict[str, type]]] = {
    "model": lambda words: {"model": chosen_task(words)},
    "data": lambda words: {"data": chosen_data(words)},
    "lora": lambda words: {"lora": LoRACallback, "lora.config": LoRAConfig},
    "trainer": lambda words: {"trainer": Trainer},
}

RENAMED = {"target": "for"}  # argument of a command → its option, whose name no Python argument can have
FLAT = {"sampling"}  # arguments of commands that are dataclasses, and whose fields are options by their own names


def group_asked_for(words: Sequence[str]) -> str | None:
    """Return the group in ``--GROUP.help``, None if there is none."""
    return next((group for group in GROUPS for word in words if word.partition("=")[0] == f"--{group}.help"), None)


def group_help(group: str, words: Sequence[str]) -> str:
    """Return the list of a group's options: name, text, type and default.

    Args:
        group: A key of ``GROUPS``.
        words: The command line, which may name the class: ``--model TASK``, or ``--model.help TASK``.
    """
    words = [word.replace(f"--{group}.help", f"--{group}", 1) for word in words]
    texts = []
    for prefix, cls in GROUPS[group](words).items():
        parser = ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
        parser.add_class_arguments(cls, prefix, fail_untyped=False, sub_configs=True, skip={"config"} if prefix == "lora" else None)
        texts.append(f"Options of {class_path(cls)}\n{parser.format_help().rstrip()}")
    return re.sub(r":\w+:`~?([^`]+)`|``", lambda role: role[1] or "", "\n\n".join(texts))  # without the markup of docstrings


def function_parser(function: Callable[..., Any], command: str, description: str) -> ArgumentParser:
    """Return the parser of a command that is a plain function: its signature is the command line.

    Required arguments are positional, and so is one called ``prompt``. `RENAMED` has the options that are called otherwise. The fields of
    an argument in `FLAT` are options. `call` undoes both.
    """
    options = "".join(f" {name.upper()}" for name, p in inspect.signature(function).parameters.items() if p.default is p.empty)
    optional: set[str | int] = {name for name in inspect.signature(function).parameters if name == "prompt"}
    usage = f"lightning-lora {command}{options}{''.join(f' [{name.upper()}]' for name in map(str, optional))} [--option value ...]"
    parser = ArgumentParser(usage=usage, description=f"{description.capitalize()}.", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file with the options.")
    arguments = arguments_of(function)
    renamed, flat = RENAMED.keys() & arguments.keys(), FLAT & arguments.keys()
    parser.add_function_arguments(function, as_group=False, as_positional=True, sub_configs=True, skip=optional | renamed | flat)
    texts = {param.arg_name: param.description for param in parse(function.__doc__ or "").params}
    for name in map(str, optional):
        parser.add_argument(name, nargs="?", type=Optional[str], help=texts[name])  # noqa: UP045 (the parser takes no X | Y here)
    for name in renamed:
        parameter, kind = arguments[name]
        parser.add_argument(f"--{RENAMED[name]}", type=kind, default=parameter.default, help=texts[name])
    for name in flat:
        parameter, kind = arguments[name]
        parser.add_class_arguments(kind, as_group=False)
        parser.set_defaults(vars(parameter.default))
    return parser


def positional_first(words: Sequence[str]) -> list[str]:
    """Return the words of a command with those that belong to no option first: the parser takes an optional one before an option only."""
    first, rest, queue = list[str](), list[str](), list(words)
    while queue and queue[0] != "--":
        word = queue.pop(0)
        if not word.startswith("--"):
            first.append(word)
            continue
        rest.append(word)
        alone = "=" in word or word in ("--help", "--print_config") or word.endswith(".help")
        if not alone and queue and not queue[0].startswith("--"):
            rest.append(queue.pop(0))
    return [*first, *rest] if not queue else list(words)


def call(function: Callable[..., Any], options: dict[str, Any]) -> Callable[[], Any]:
    """Return a call of a command with the options that its parser has read.

    Raises:
        ValueError: An option is null and cannot be None.
    """
    known = arguments_of(function)
    given = {name: options[RENAMED.get(name, name)] for name in known if name not in FLAT}
    check_not_null(function, given)
    for name in FLAT & known.keys():
        kind = known[name][1]
        fields = {field: options[field] for field in arguments_of(kind)}
        check_not_null(kind, fields)
        given[name] = kind(**fields)
    return partial(function, **given)
