"""The formats of rows: which keys each has, and which record a row of it becomes.

A format is recognised by its keys, or named by ``data.format``. Their names and keys are those of TRL, axolotl and LLaMA-Factory. To add
one, write a function from a row to a record and give it an entry in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_lora.data.messages import check_prompt, parsed, text_of, tools_of, turns_of
from lightning_lora.data.records import Conversation, Labelled, LabelledImage, Message, Pair, PlainText, Record, Tagged

Row = dict[str, Any]
# ShareGPT's names of the roles, and those of data sets in its form.
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant"}
ROLES |= {"observation": "tool", "function_response": "tool"}


@dataclass(frozen=True)
class RowFormat:
    """How rows of a format are recognised and read.

    Attributes:
        keys: Keys by which a row is recognised.
        answers: Further keys that it must have, except in prediction.
        read: Makes the record. Its second argument tells whether an answer is needed.
        example: A row, for error messages.
    """

    keys: tuple[str, ...]
    answers: tuple[str, ...]
    read: Callable[[Row, bool], Record]
    example: str


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
    row = {key: value for key, value in _renamed(row, columns or {}).items() if value is not None}  # tables have every key in every row
    if format == "auto":
        format = _recognised(row)
    chosen = FORMATS[format]
    missing = [key for key in chosen.keys + chosen.answers * needs_answer if key not in row]
    if missing:
        raise ValueError(
            f"no {' and no '.join(map(repr, missing))} among the keys {sorted(row)}, for the format {format!r}: {chosen.example}; "
            "data.columns renames keys"
        )
    return chosen.read(row, needs_answer)


def check_format(format: str) -> None:
    """Refuse a name that is in no entry of `FORMATS`."""
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"data.format={format!r} is not known; the formats are auto, {', '.join(FORMATS)}")


def _recognised(row: Row) -> str:
    for needs_answer in (True, False):  # text with a label before text alone
        for name, format in FORMATS.items():
            if set(format.keys + format.answers * needs_answer) <= row.keys():
                return name
    known = "; ".join(f"{name}: {', '.join(format.keys + format.answers)}" for name, format in FORMATS.items())
    raise ValueError(f"the keys {sorted(row)} are of no known format ({known}); rename them with data.columns")


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


def _conversation(row: Row, messages: list[Message], needs_answer: bool) -> Conversation:
    """Check what all conversations share."""
    if row.get("system") and messages[:1] and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": text_of(row["system"], "'system'")}, *messages]
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
    if not last["content"].strip() and not last.get("tool_calls"):
        raise ValueError(f"the answer is {last['content']!r}; it must be a text that is not empty, or there is nothing to learn")
    choices = row.get("choices")
    if choices is not None and (
        not isinstance(choices, list) or not all(isinstance(c, str) for c in choices) or last["content"] not in choices
    ):
        raise ValueError(f"'choices' must be a list of texts that holds the answer {last['content']!r}, got {choices!r}")
    return Conversation(messages, tools_of(row), choices)


def _messages(row: Row, needs_answer: bool) -> Record:
    return _conversation(row, turns_of(row["messages"], "messages"), needs_answer)


def _sharegpt(row: Row, needs_answer: bool) -> Record:
    turns = row["conversations"]
    if isinstance(turns, str):
        turns = parsed(turns, "'conversations'")
    if not isinstance(turns, list) or not all(isinstance(t, dict) and ("role" in t or {"from", "value"} <= t.keys()) for t in turns):
        raise ValueError(f"'conversations' must be a list of objects with 'from' and 'value': {FORMATS['conversations'].example}")
    messages = [turn if "role" in turn else _said(str(turn["from"]), turn["value"]) for turn in turns]
    return _conversation(row, turns_of(messages, "conversations"), needs_answer)


def _said(speaker: str, value: Any) -> Message:
    """Return ShareGPT's turn as a message."""
    if speaker == "function_call":
        calls = parsed(text_of(value, "a function_call"), "a function_call's value")
        return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return {"role": ROLES.get(speaker, speaker), "content": value}


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
    messages = [*before, *_as_turns(prompt, "user", "the prompt")]
    return _conversation(row, messages + (_as_turns(answer, "assistant", "the answer") if needs_answer else []), needs_answer)


def _as_turns(value: Any, role: str, name: str) -> list[Message]:
    if isinstance(value, list):
        return turns_of(value, name)
    return [{"role": role, "content": text_of(value, name)}]


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
    """Two answers. Without a prompt, what both begin with is the prompt, as in TRL."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str) and prompt is None:
        same = [one == other for one, other in zip(chosen, rejected, strict=False)]
        start = chosen[: same.index(False) if False in same else len(same)]
        start = start[: start.rfind(" ") + 1 or len(start)] if start[-1:].isalnum() else start  # not inside a word
        return _told_apart(Pair(start, chosen[len(start) :], rejected[len(start) :], tools_of(row)))
    good, bad = _as_turns(chosen, "assistant", "'chosen'"), _as_turns(rejected, "assistant", "'rejected'")
    if prompt is not None:
        before = _as_turns(prompt, "user", "the prompt")
    else:
        same = [one == other for one, other in zip(good, bad, strict=False)]
        before = good[: same.index(False) if False in same else len(same)]
    if good[: len(before)] == before and bad[: len(before)] == before:  # some files repeat the prompt in both
        good, bad = good[len(before) :], bad[len(before) :]
    return _told_apart(Pair(before, good, bad, tools_of(row)))


def _told_apart(pair: Pair) -> Pair:
    if not pair.prompt:
        raise ValueError("'chosen' and 'rejected' have no prompt: add 'prompt', or begin both with it")
    if not pair.chosen or not pair.rejected or pair.chosen == pair.rejected:
        raise ValueError("'chosen' and 'rejected' must both have an answer, and not the same one")
    return pair


FORMATS: dict[str, RowFormat] = {
    "preference": RowFormat(("chosen", "rejected"), (), _pair, '{"prompt": "...", "chosen": "...", "rejected": "..."}'),
    "messages": RowFormat(("messages",), (), _messages, '{"messages": [{"role": "user", "content": "..."}, ...]}'),
    "conversations": RowFormat(("conversations",), (), _sharegpt, '{"conversations": [{"from": "human", "value": "..."}, ...]}'),
    "alpaca": RowFormat(("instruction",), ("output",), _alpaca, '{"instruction": "...", "input": "...", "output": "..."}'),
    "prompt_response": RowFormat(("prompt",), ("response",), _prompted("response"), '{"prompt": "...", "response": "..."}'),
    "prompt_completion": RowFormat(("prompt",), ("completion",), _prompted("completion"), '{"prompt": "...", "completion": "..."}'),
    "labelled": RowFormat(("text",), ("label",), _labelled, '{"text": "...", "label": "..."}'),
    "tagged": RowFormat(("tokens",), ("tags",), _tagged, '{"tokens": ["Emma", "reads"], "tags": ["B-PER", "O"]}'),
    "image": RowFormat(("path",), ("label",), _image, '{"path": "cats/1.png", "label": "cat"}'),
    "text": RowFormat(("text",), (), _text, '{"text": "..."}'),
}
