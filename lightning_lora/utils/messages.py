"""Messages: names on one line, and a line added to an exception that was raised, which stays the same object for its handlers."""

from __future__ import annotations

from collections.abc import Sequence

_OF_ONE = {"are": "is", "were": "was", "do": "does", "have": "has", "differ": "differs", "train": "trains"}


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return names as a list in text, the first ones of many."""
    return f"[{', '.join(map(repr, names[:most]))}{f', ... {len(names)} in all' if len(names) > most else ''}]"


def counted(number: int, noun: str, verb: str = "") -> str:
    """Return a number with its noun, and a verb: ``1 tensor is``, ``2 tensors are``."""
    if number == 1:
        start, space, last = verb.rpartition(" ")
        verb = start + space + _OF_ONE.get(last, last)
    else:
        ends_in_y = noun.endswith("y") and noun[-2] not in "aeou"
        noun = f"{noun[:-1]}ies" if ends_in_y else f"{noun}es" if noun.endswith(("s", "x", "ch")) else f"{noun}s"
    return f"{number:,} {noun} {verb}".rstrip()


def append_line(exception: BaseException, line: str) -> None:
    """Append a line to an exception's message. If the message is not its only argument, add a note instead."""
    text = str(exception)
    if line in (text, *getattr(exception, "__notes__", ())) or text.endswith(f"\n{line}"):
        return
    if exception.args in ((text,), ()):
        exception.args = (f"{text}\n{line}" if text else line,)
    elif hasattr(exception, "add_note"):  # from Python 3.11 on
        exception.add_note(line)
