"""The formats of rows: which keys each has, and which record a row of it becomes.

A format is recognised by its keys, or named by ``data.format``. Their names and keys are those of TRL, axolotl and LLaMA-Factory. To add
one, write a function from a row to a record and give it an entry in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_lora.data.messages import (
    ROLES,
    SPEAKERS,
    as_turns,
    begun_by_system,
    check_prompt,
    check_text_only,
    parsed,
    text_of,
    tools_of,
    turns_of,
)
from lightning_lora.data.pairs import pair_of
from lightning_lora.data.records import Conversation, Labelled, LabelledImage, Message, NothingToLearn, PlainText, Record, Tagged

Row = dict[str, Any]
ALSO = ("system", "system_prompt", "tools", "choices")  # what every conversation may have


@dataclass(frozen=True)
class RowFormat:
    """How rows of a format are recognised and read.

    Attributes:
        keys: Keys by which a row is recognised.
        answers: Further keys that it must have, except in prediction.
        read: Makes the record. Its second argument tells whether an answer is needed.
        example: A row, for error messages.
        also: Keys that it may have.
    """

    keys: tuple[str, ...]
    answers: tuple[str, ...]
    read: Callable[[Row, bool], Record]
    example: str
    also: tuple[str, ...] = ()


def to_record(row: Any, format: str = "auto", columns: Mapping[str, str] | None = None, needs_answer: bool = True) -> Record:
    """Return what a row means.

    Args:
        row: The parsed row.
        format: A name in `FORMATS`, or "auto": the first one whose keys the row has.
        columns: Pairs of names. Whichever of the two a row has gets the other name. So ``{response: reply}`` and ``{reply: response}``
            both read the column "reply" as "response".
        needs_answer: Require what is to be learnt. False in prediction.

    Raises:
        ValueError: The row has no known format, lacks a key, or has a value of the wrong kind.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}; a row is {FORMATS['prompt_response'].example}, for example")
    row = _renamed(row, columns or {})
    nulls = sorted(key for key, value in row.items() if value is None)
    row = {key: value for key, value in row.items() if value is not None}  # tables have every key in every row
    null = f" (null: {', '.join(nulls)})" if nulls else ""
    if format == "auto":
        format = _recognised(row, null)
    chosen = FORMATS[format]
    missing = [key for key in chosen.keys + chosen.answers * needs_answer if key not in row]
    if missing:
        raise ValueError(
            f"no {' and no '.join(map(repr, missing))} among the keys {sorted(row)}{null}, for the format {format!r}: {chosen.example}; "
            "data.columns renames keys"
        )
    return chosen.read(row, needs_answer)


def unread(row: Row, format: str = "auto", columns: Mapping[str, str] | None = None) -> list[str]:
    """Return the keys of a row that `to_record` does not read. Arguments are its."""
    row = _renamed(row, columns or {})
    chosen = FORMATS[_recognised({key: value for key, value in row.items() if value is not None}) if format == "auto" else format]
    return sorted(str(key) for key in row if key not in (*chosen.keys, *chosen.answers, *chosen.also))


def check_format(format: str) -> None:
    """Refuse a name that is in no entry of `FORMATS`."""
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"data.format={format!r} is not known; the formats are auto, {', '.join(FORMATS)}")


def _recognised(row: Row, null: str = "") -> str:
    for needs_answer in (True, False):  # text with a label before text alone
        for name, format in FORMATS.items():
            if set(format.keys + format.answers * needs_answer) <= row.keys():
                answers = row.keys() & {"response", "completion", "output", "chosen", "rejected"} if name == "text" else ()
                if answers:
                    raise ValueError(
                        f"the row has 'text' and {', '.join(map(repr, sorted(answers)))}: name the prompt with data.columns, "
                        "as {text: prompt}, or set data.format: text to learn the text alone"
                    )
                return name
    known = "; ".join(f"{name}: {', '.join(format.keys + format.answers)}" for name, format in FORMATS.items())
    raise ValueError(f"the keys {sorted(row)}{null} are of no known format ({known}); rename them with data.columns")


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    row = dict(row)
    for one, other in columns.items():
        there = [name for name in (one, other) if name in row]
        if len(there) != 1:
            raise ValueError(
                f"data.columns has {one}: {other}, and the row has {'both' if there else 'neither'} of them among its keys {sorted(row)}"
            )
        row[other if there == [one] else one] = row.pop(there[0])
    return row


def _conversation(row: Row, messages: list[Message], needs_answer: bool, given: int = 0) -> Conversation:
    """Check what all conversations share."""
    check_text_only(row)
    if messages:
        count, messages = len(messages), begun_by_system(row, messages)
        given += (len(messages) - count) * (given > 0)
    if not needs_answer and messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError("there are no messages; give the model something to answer")
    if not needs_answer:
        check_prompt(messages)
        return Conversation(messages, tools_of(row))
    last = messages[-1]
    if last["role"] != "assistant":
        raise ValueError(f"the last message must be the assistant's answer, not of {last['role']!r}; add it, or leave the row out")
    check_prompt(messages[:-1])
    for turn in messages[given:]:
        if turn["role"] == "assistant" and not turn["content"].strip() and not turn.get("tool_calls") and turn.get("weight", 1):
            raise NothingToLearn(f"the answer is {turn['content']!r}; it must be a text that is not empty, or there is nothing to learn")
    choices = row.get("choices")
    if choices is not None and (
        not isinstance(choices, list) or not all(isinstance(c, str) for c in choices) or last["content"] not in choices
    ):
        raise ValueError(f"'choices' must be a list of texts that holds the answer {last['content']!r}, got {choices!r}")
    if choices is not None and len({*choices}) < 2:
        raise ValueError(f"'choices' holds only the answer {last['content']!r}, so every model would be right; add the others")
    return Conversation(messages, tools_of(row), choices, given)


def _messages(row: Row, needs_answer: bool) -> Record:
    return _conversation(row, turns_of(row["messages"], "messages"), needs_answer)


def _sharegpt(row: Row, needs_answer: bool) -> Record:
    turns = row["conversations"]
    if isinstance(turns, str):
        turns = parsed(turns, "'conversations'")
    if not isinstance(turns, list) or not all(isinstance(t, dict) and ("role" in t or {"from", "value"} <= t.keys()) for t in turns):
        raise ValueError(f"'conversations' must be a list of objects with 'from' and 'value': {FORMATS['conversations'].example}")
    messages = [turn if "role" in turn else _said(turn) for turn in turns]
    return _conversation(row, turns_of(messages, "conversations"), needs_answer)


def _said(turn: Row) -> Message:
    """Return ShareGPT's turn as a message."""
    speaker, value = str(turn["from"]), turn["value"]
    others = {key: content for key, content in turn.items() if key not in ("from", "value")}
    if speaker in ("function_call", "tool_call"):
        calls = parsed(text_of(value, f"a {speaker}"), f"a {speaker}'s value")
        return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls], **others}
    role = speaker.strip().lower()
    role = SPEAKERS.get(role, role)
    if role not in ROLES:
        raise ValueError(f"the speaker {speaker!r} is none of human, gpt, function_call, {', '.join({**SPEAKERS, **dict.fromkeys(ROLES)})}")
    return {"role": role, "content": value, **others}


def _alpaca(row: Row, needs_answer: bool) -> Record:
    parts = [text_of(row[key], f"{key!r}") for key in ("instruction", "input") if row.get(key)]
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and [str, str] == list(map(type, pair)) for pair in history):
        raise ValueError(f"'history' must be a list of pairs of texts, got {history!r:.60}")
    before = [{"role": role, "content": text} for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    return _exchange(row, before, "\n".join(parts), row.get("output"), needs_answer)


def _prompted(answer: str) -> Callable[[Row, bool], Record]:
    """Return the reader of rows with a prompt and an answer: texts, or lists of messages."""

    def read(row: Row, needs_answer: bool) -> Record:
        return _exchange(row, [], row["prompt"], row.get(answer), needs_answer)

    return read


def _exchange(row: Row, before: list[Message], prompt: Any, answer: Any, needs_answer: bool) -> Record:
    """Return a prompt with its answer. Answers that the prompt holds are not learnt, those of ``before`` are."""
    messages = [*before, *as_turns(prompt, "user", "the prompt")]
    if messages and messages[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with the assistant's message, and no answer goes on in one; end it with another's")
    given = max((i + 1 for i, turn in enumerate(messages) if i >= len(before) and turn["role"] == "assistant"), default=0)
    return _conversation(
        row, messages + (as_turns(answer, "assistant", "the answer") if needs_answer else []), needs_answer, given * needs_answer
    )


def _text(row: Row, needs_answer: bool) -> Record:
    return PlainText(text_of(row["text"], "'text'"))


def _labelled(row: Row, needs_answer: bool) -> Record:
    label = row.get("label")
    if needs_answer and not isinstance(label, (str, int, float)):
        raise ValueError(f"'label' must be a text or a number, got {label!r:.60}")
    return Labelled(text_of(row["text"], "'text'"), label)


def _image(row: Row, needs_answer: bool) -> Record:
    return LabelledImage(text_of(row["path"], "'path'"), row.get("label"))


def _tagged(row: Row, needs_answer: bool) -> Record:
    tokens, tags = row["tokens"], row.get("tags", [])
    if not isinstance(tokens, list) or not all(isinstance(token, str) and token.strip() for token in tokens):
        raise ValueError(f"'tokens' must be a list of words, none of them empty, got {tokens!r:.60}")
    if needs_answer and (not isinstance(tags, list) or len(tags) != len(tokens)):
        count = len(tags) if isinstance(tags, list) else f"{tags!r:.40}"
        raise ValueError(f"'tags' must be a list with one tag per token: {len(tokens)} tokens, tags: {count}")
    return Tagged(["".join(token.split()) for token in tokens], tags if needs_answer else [])


def _pair(row: Row, needs_answer: bool) -> Record:
    check_text_only(row)
    return pair_of(row, needs_answer)


FORMATS: dict[str, RowFormat] = {
    "preference": RowFormat(("chosen", "rejected"), (), _pair, '{"prompt": "...", "chosen": "...", "rejected": "..."}', ("prompt", *ALSO)),
    "messages": RowFormat(("messages",), (), _messages, '{"messages": [{"role": "user", "content": "..."}, ...]}', ALSO),
    "conversations": RowFormat(("conversations",), (), _sharegpt, '{"conversations": [{"from": "human", "value": "..."}, ...]}', ALSO),
    "alpaca": RowFormat(
        ("instruction",), ("output",), _alpaca, '{"instruction": "...", "input": "...", "output": "..."}', ("input", "history", *ALSO)
    ),
    "prompt_response": RowFormat(("prompt",), ("response",), _prompted("response"), '{"prompt": "...", "response": "..."}', ALSO),
    "prompt_completion": RowFormat(("prompt",), ("completion",), _prompted("completion"), '{"prompt": "...", "completion": "..."}', ALSO),
    "labelled": RowFormat(("text",), ("label",), _labelled, '{"text": "...", "label": "..."}'),
    "tagged": RowFormat(("tokens",), ("tags",), _tagged, '{"tokens": ["Emma", "reads"], "tags": ["B-PER", "O"]}'),
    "image": RowFormat(("path",), ("label",), _image, '{"path": "cats/1.png", "label": "cat"}'),
    "text": RowFormat(("text",), (), _text, '{"text": "..."}'),
}
