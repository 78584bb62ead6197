"""Read config files strictly, where a duplicate key is an error and every message names the file; and write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_config_files(args: Sequence[str]) -> None:
    """Read every file that ``--config`` names.

    Raises:
        ValueError: A file is missing, no UTF-8, no YAML, empty, not a mapping, or has a key twice. The message names file and line.
    """
    for index, argument in enumerate(args):
        option, equals, value = argument.partition("=")
        if option in ("--config", "-c") and (equals or index + 1 < len(args)):
            _check(value if equals else args[index + 1])


def as_yaml(parser: ArgumentParser, config: Namespace, links: bool = False) -> str:
    """Return what a parser has read as the text of a config file. It is not validated again, which takes longer than all the rest.

    Args:
        parser: The parser.
        config: What it has read.
        links: Include options that are linked to others.
    """
    return parser.dump(config, format="yaml", skip_none=False, skip_validation=True, skip_link_targets=not links)


def read_yaml(text: str) -> Any:
    """Return the values in a text of `as_yaml`."""
    return yaml.load(text, _Loader)


@contextmanager
def unique_keys() -> Iterator[None]:
    """Refuse duplicate keys in all YAML that the parser reads, on the command line too."""
    usual = get_loader("yaml")

    def strict(text: str) -> Any:
        twice = key_twice(text)
        if twice is not None:
            raise ValueError(f"{twice[0]!r} is there twice in {text!r}")
        return usual(text)

    set_loader("yaml", strict, (yaml.YAMLError,))
    try:
        yield
    finally:
        set_loader("yaml", usual, (yaml.YAMLError,))


def content_of(name: str) -> dict[str, Any]:
    """Return the content of a config file, or of a config given as text; {} if it cannot be read, which ``check_config_files`` reports."""
    try:
        text = name if name.lstrip().startswith("{") else Path(name).read_text(encoding="utf-8")
        content = yaml.load(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _check(name: str) -> None:
    if name.lstrip().startswith("{"):
        return  # the text of a config, not the name of a file
    where, path = f"--config {name}", Path(name)
    if path.is_dir() or not path.exists():
        raise ValueError(f"{where}: {'this is a folder' if path.is_dir() else 'no such file'}; name a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        before = "" if mark is None else "".join(text.splitlines()[mark.line : mark.line + 1])[: mark.column + 1]  # "" behind the last line
        tab = "; indent with spaces, not tabs" if "\t" in before else ""
        raise ValueError(f"{where}{line} is not YAML: {getattr(error, 'problem', None) or error}{tab}") from error
    if not isinstance(content, dict):
        kind = "is empty" if content is None else f"holds a value of type {type(content).__name__}"
        raise ValueError(f"{where} {kind}; it should hold keys such as model:, data:, lora:, trainer:")
    if (empty := next((key for key in ("model", "data", "lora", "trainer") if content.get(key, "") is None), None)) is not None:
        raise ValueError(f"{where}: {empty}: is empty; write its options under it, or leave it out")
    twice = key_twice(text)
    if twice is not None:
        raise ValueError(f"{where}, line {twice[1]}: the key {twice[0]!r} is there twice; remove one")


def key_twice(text: str) -> tuple[str, int] | None:
    """Return the first key that a mapping has twice, and its line; None if there is none, or if this is no YAML."""
    try:
        nodes = [yaml.compose(text, Loader=_Loader)]
    except yaml.YAMLError:
        return None
    known = set(nodes)
    for node in nodes:  # the loop appends to it
        inside = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            inside, seen = [value for _, value in node.value], set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    return key.value, key.start_mark.line + 1
                seen.add(key.value)
        nodes += [each for each in inside if each not in known]  # an alias may name what it stands in
        known.update(inside)
    return None
