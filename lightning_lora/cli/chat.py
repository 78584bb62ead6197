"""`chat`: a conversation with a model, on a terminal or from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from lightning_lora.cli.answers import Answerer, Sampling, write_out
from lightning_lora.cli.tuned import load_tuned
from lightning_lora.data.records import Conversation, Message
from lightning_lora.tasks.hf import DType

WORDS = {"/reset": "forget the conversation", "/system TEXT": "begin anew with another system message", "/exit": "end; so does Ctrl-D"}


def chat(
    model: str,
    adapter: str | None = None,
    system: str | None = None,
    sampling: Sampling = Sampling(max_new_tokens=512),  # noqa: B008 (frozen)
    gguf_file: str | None = None,
    dtype: DType = "auto",
) -> None:
    """Talk to a model. Each line is a message; from a pipe too, where stdout gets nothing but answers.

    Args:
        model: A hub id or a local folder. Its tokenizer must have a chat template.
        adapter: An adapter folder or a checkpoint (.ckpt); without one the base model answers.
        system: The system message.
        sampling: How answers are generated; its fields are options.
        gguf_file: A GGUF file in the model's folder.
        dtype: The weights' dtype.

    Raises:
        ValueError: The tokenizer has no chat template, a path does not exist, or the adapter does not fit the model.
    """
    tuned = load_tuned(model, adapter, gguf_file, dtype)
    answerer = Answerer(tuned, sampling)
    if not getattr(tuned.preprocessor, "chat_template", None):
        raise ValueError(f"model={model!r} has no chat template, so it keeps no conversation; use generate, one prompt at a time")
    _Conversation(answerer, system, sys.stdin.isatty()).run(_lines())


class _Conversation:
    """The messages so far, and what a line does."""

    def __init__(self, answerer: Answerer, system: str | None, terminal: bool) -> None:
        self.answerer, self.system, self.terminal = answerer, system, terminal
        self.messages: list[Message] = []
        self.commands: dict[str, Callable[[str], None]] = {"/reset": self._reset, "/system": self._begin_with, "/help": self._help}
        self._reset()

    def run(self, lines: Iterator[str]) -> None:
        """Answer lines until they end, or until one is /exit."""
        self._help()
        for line in lines:
            word, _, rest = line.partition(" ")
            if word == "/exit":
                return
            if word in self.commands:
                self.commands[word](rest)
            elif word.startswith("/") and self.terminal:
                self._say(f"no command {word!r}")
                self._help()
            else:
                self._answer(line)

    def _answer(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        try:
            answer = self.answerer.stream(Conversation(self.messages), write_out)
        except KeyboardInterrupt:  # the answer stops, and the conversation goes on without it
            if not self.terminal:
                raise
            self.messages.pop()
        except ValueError as error:  # as of a conversation that has grown longer than the model's context
            if not self.terminal:
                raise
            self.messages.pop()
            self._say(f"{error}; /reset forgets what was said before")
        else:
            self.messages.append({"role": "assistant", "content": answer})
        print(flush=True)

    def _reset(self, rest: str = "") -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def _begin_with(self, text: str) -> None:
        self.system = text or None
        self._reset()

    def _help(self, rest: str = "") -> None:
        self._say("; ".join(f"{word}: {what}" for word, what in WORDS.items()))

    def _say(self, text: str) -> None:
        if self.terminal:
            print(text, file=sys.stderr)


def _lines() -> Iterator[str]:
    """Yield the lines of stdin that are not empty. On a terminal, ask for them with line editing."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 (input() then has line editing and history)
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            return
        if not line and not sys.stdin.isatty():
            return
        if line.strip():
            yield line.strip()
