"""Messages: names on one line, and a line added to an exception that was raised, which stays the same object for its handlers."""

from __future__ import annotations

from collections.abc import Sequence


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return names as a list in text, the first ones of many."""
    return f"[{', '.join(map(repr, names[:most]))}{f', ... {len(names)} in all' if len(names) > most else ''}]"


def append_line(exception: BaseException, line: str) -> None:
    """Append a line to an exception's message. If the message is not its only argument, add a note instead."""
    text = str(exception)
    if line in (text, *getattr(exception, "__notes__", ())) or text.endswith(f"\n{line}"):
        return
    if exception.args in ((text,), ()):
        exception.args = (f"{text}\n{line}" if text else line,)
    elif hasattr(exception, "add_note"):  # from Python 3.11 on
        exception.add_note(line)
