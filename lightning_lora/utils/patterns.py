"""Module-name patterns: how one entry of ``target_modules`` (or ``exclude_modules``, ``rank_pattern`` …) matches names.

An entry without a regex metacharacter other than ``.`` is a plain name. It matches the last part of a module's fully qualified name
(FQN) or a dotted suffix of it. So ``q_proj`` and ``self_attn.q_proj`` both match ``layers.0.self_attn.q_proj``. Any other entry is a
regex over the whole FQN. Matching takes one pass over the module names. A regex with catastrophic backtracking can still take long for
each name, because Python's ``re`` has no time limit.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")

_METACHARACTERS = set("^$*+?{}[]\\|()")


@dataclass(frozen=True)
class Pattern:
    """One compiled entry. ``text`` is what the user wrote, for messages."""

    text: str
    regex: re.Pattern[str]

    def matches(self, fqn: str) -> bool:
        """True if the pattern matches the module named ``fqn``."""
        return self.regex.fullmatch(fqn) is not None


def is_regex(entry: str) -> bool:
    """True if an entry of a list is read as a regex, False if as a plain name."""
    return any(char in _METACHARACTERS for char in entry)


def exactly(name: str, prefix: str = "") -> str:
    """Return a regex that matches this name alone, and the same name after a prefix: that of the part of a model which names begin in."""
    return rf"^(?:{re.escape(prefix)}\.)?{re.escape(name)}$" if prefix else f"^{re.escape(name)}$"


def by_name(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return a table of names with longer ones first: the first that matches a layer counts, and a name matches all that end in it."""
    return {fqn: values[fqn] for fqn in sorted(values, key=lambda fqn: (-len(fqn), fqn))}


def compile_pattern(entry: str, field: str, *, whole: bool = False) -> Pattern:
    """Compile one entry of a config field.

    Args:
        entry: a plain name or a regex.
        field: name of the config field, for messages.
        whole: read the entry as a regex over the whole name, whatever it contains.

    Raises:
        ValueError: the entry is empty or an invalid regex. The message gives the position.
    """
    if not isinstance(entry, str) or not entry:
        raise ValueError(f"{field}: {entry!r} is not a module name or regex; give a non-empty string such as 'q_proj'.")
    try:
        source = entry if whole or is_regex(entry) else rf"(?:.*\.)?{re.escape(entry)}"
        return Pattern(entry, re.compile(source, re.DOTALL))
    except re.error as error:
        where = "" if error.pos is None else f" at position {error.pos}"
        raise ValueError(f"{field}: {entry!r} is not a valid regex: {error.msg}{where}.") from error


def compile_patterns(value: str | Iterable[str], field: str) -> tuple[Pattern, ...]:
    """Compile a field: a list of entries, or one regex string over the whole FQN."""
    if isinstance(value, str):
        return (compile_pattern(value, field, whole=True),)
    return tuple(compile_pattern(entry, field) for entry in value)


def no_match(field: str, text: str, names: Iterable[str]) -> str:
    """Return the message for a pattern that matches none of the modules ``names``. It lists the closest last parts of names."""
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    if not any(short):
        return f"{field}: {text!r} matches no module, for there is none inside: adapt the part around it."
    near = difflib.get_close_matches(text.rpartition(".")[2], short, n=4, cutoff=0.5) or short[:8]
    hint = f" A single string is a regex over the whole name; for a plain name give a list: [{text!r}]." if text in short else ""
    if "," in text and not is_regex(text):
        hint = f" Several names are a list: {[part.strip() for part in text.split(',')]}."
    elif field == "target_modules" and text.lower() in ("all", "all_linear", "all linear", "linear"):
        hint = " For all linear layers write target_modules: all-linear."
    found = ", ".join(near) or "none"
    return f"{field}: {text!r} matches no module. Nearest names: {found}.{hint} (allow_unmatched=True accepts it beside others.)"


def layer_index(fqn: str) -> int | None:
    """Return the index of the block that contains a module: the first whole number in its FQN (``model.layers.3.mlp`` → 3)."""
    return next((int(part) for part in fqn.split(".") if part.isdigit()), None)


def starred(fqn: str) -> str:
    """Return the name with ``*`` for each number, so that layers of all blocks share one name."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", fqn)


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names that differ only in numbers. Each key is the starred name."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(starred(name), []).append(name)
    return kinds
