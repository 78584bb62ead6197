"""Add a line to the message of an exception that was raised. The exception stays the same object, so its handlers still match."""

from __future__ import annotations


def append_line(exception: BaseException, line: str) -> None:
    """Append a line to an exception's message. If the message is not its only argument, add a note instead."""
    text = str(exception)
    if line in (text, *getattr(exception, "__notes__", ())) or text.endswith(f"\n{line}"):
        return
    if exception.args in ((text,), ()):
        exception.args = (f"{text}\n{line}" if text else line,)
    elif hasattr(exception, "add_note"):  # from Python 3.11 on
        exception.add_note(line)
