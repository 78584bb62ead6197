"""A parser of each command serves all tests of a process: making one takes 0.04 s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MADE: dict[tuple[type, str | None], dict[str, Any]] = {}


def share_parser(cli: Any, make: Callable[..., None], *args: Any) -> None:
    """Give a command line the parser that one of its class and command has made, or let it make one, as its ``setup_parser``."""
    key = (type(cli), cli.command)
    if key not in _MADE:
        make(cli, *args)
        _MADE[key] = {name: vars(cli)[name] for name in ("parser", "_subcommand_parsers", "_subcommand_method_arguments")}
    vars(cli).update(_MADE[key])
    parser = cli._subcommand_parsers[cli.command]
    parser.set_defaults(cli.defaults)  # which depend on the words
    parser.callback_keys = ["lora"]
