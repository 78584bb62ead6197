"""The names of trials, which their folders have too."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

NAME = re.compile(r"[^\w.+-]+")
LONGEST = 100  # characters of a folder's name


def name_trials(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return each trial's name and its other settings.

    Args:
        found: the settings of each. ``name`` is the trial's name; without it, its settings are.

    Raises:
        ValueError: two names are equal, or one is no folder's name.
    """
    named: list[tuple[str, dict[str, Any]]] = []
    for each in found:
        values = {key: value for key, value in each.items() if key != "name"}
        name = str(each.get("name") or _name(values))
        if NAME.search(name) or name in (".", ".."):
            raise ValueError(f"the trial's name {name!r} is no folder's name; use letters, digits and . + - _")
        if any(other == name for other, _ in named):
            raise ValueError(f"two trials are {name!r}; leave one out, or give them a name: of their own")
        named.append((name, values))
    return named


def text_of(value: Any) -> str:
    """Return a value as YAML on one line, a string as it is."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def _name(values: Mapping[str, Any]) -> str:
    name = "-".join(NAME.sub("_", f"{key.rpartition('.')[2]}{text_of(value)}") for key, value in values.items())
    return name[:LONGEST].strip("_")
