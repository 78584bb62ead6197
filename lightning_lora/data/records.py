"""What a row of data means, whatever its format: a conversation, a text, a text or an image with a label, words with labels, or a pair."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: One turn: ``role``, ``content``, and what a chat template may read beside them (``tool_calls``, ``reasoning_content``, ...).
Message = dict[str, Any]


class NothingToLearn(ValueError):
    """A row is in order and teaches nothing, such as one whose answer is empty. It is left out of a run and counted."""


@dataclass
class Conversation:
    """Turns to learn from, or to answer.

    Attributes:
        messages: The turns. The last one is the assistant's, except in prediction.
        tools: The functions that the assistant may call, as JSON schemas; None without.
        choices: Texts to choose the last answer from, which is one of them; None for a free answer.
        given: How many messages at the beginning are given, so that answers among them are not learnt.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    choices: list[str] | None = None
    given: int = 0


@dataclass
class PlainText:
    """A text to continue, which is learnt as a whole."""

    text: str


@dataclass
class Labelled:
    """A text and its label; None in prediction."""

    text: str
    label: str | int | float | None = None


@dataclass
class LabelledImage:
    """An image's file and its label; None in prediction."""

    path: str
    label: str | int | float | None = None


@dataclass
class Tagged:
    """The words of a text and a label for each; no labels in prediction."""

    tokens: list[str]
    tags: list[Any] = field(default_factory=list)


@dataclass
class Pair:
    """Two answers to one prompt, the better one first.

    Attributes:
        prompt: The turns before the answers; or a raw text, which gets no chat template.
        chosen: The turns of the better answer; or a raw text.
        rejected: The turns of the other answer; or a raw text.
        tools: As in `Conversation`.
    """

    prompt: list[Message] | str
    chosen: list[Message] | str
    rejected: list[Message] | str
    tools: list[Any] | None = field(default=None)


Record = Conversation | PlainText | Labelled | LabelledImage | Tagged | Pair

#: What each record is called in messages.
CALLED: dict[type, str] = {
    Conversation: "a conversation",
    PlainText: "a text",
    Labelled: "a text with a label",
    LabelledImage: "an image's path",
    Tagged: "tokens with tags",
    Pair: "a pair of chosen and rejected",
}
