"""Read a row with a better and a worse answer to one prompt."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from lightning_lora.data.messages import as_turns, begun_by_system, tools_of
from lightning_lora.data.records import Message, NothingToLearn, Pair


def pair_of(row: dict[str, Any], needs_answer: bool = True) -> Pair:
    """Return the pair. As in TRL, the prompt is what both answers begin with if there is none, or if it is a text and they are lists of
    messages that begin with a question: some files repeat the prompt there.

    Raises:
        NothingToLearn: An answer is empty, or both are the same. In prediction it is a plain ValueError.
        ValueError: There is no prompt, or an answer begins with another one or does not end with the assistant.
    """
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str) and prompt is None:
        return _raw(row, chosen, rejected, needs_answer)
    good, bad = as_turns(chosen, "assistant", "'chosen'"), as_turns(rejected, "assistant", "'rejected'")
    given = [] if prompt is None else as_turns(prompt, "user", "the prompt")
    before = [one for one, _ in takewhile(lambda both: both[0] == both[1], zip(good, bad, strict=False))]
    if not given or (isinstance(prompt, str) and any(_same(given[-1], message) for message in before)):
        good, bad = good[len(before) :], bad[len(before) :]
    else:
        good, bad = (answer[len(given) :] if answer[: len(given)] == given else answer for answer in (good, bad))
        before = given
    for name, answer in (("chosen", good), ("rejected", bad)):
        if before and answer and (answer[0]["role"] != "assistant" or answer[-1]["role"] != "assistant"):
            raise ValueError(
                f"{name!r} must have the assistant's messages behind the prompt, but begins there with a message of {answer[0]['role']!r} "
                f"and ends with one of {answer[-1]['role']!r}; if it repeats the prompt, write both alike"
            )
    return _told_apart(Pair(begun_by_system(row, before) if before else before, good, bad, tools_of(row)), needs_answer)


def _same(one: Message, other: Message) -> bool:
    return one["role"] == other["role"] and bool(one["content"].strip() == other["content"].strip())


def _raw(row: dict[str, Any], chosen: str, rejected: str, needs_answer: bool) -> Pair:
    """Return a pair of texts without a chat template."""
    if row.get("system") or row.get("system_prompt"):
        raise ValueError("a system message needs a prompt: name its column with data.columns, or begin both texts with the system message")
    same = [one == other for one, other in zip(chosen, rejected, strict=False)]
    start = chosen[: same.index(False) if False in same else len(same)]
    start = start[: start.rfind(" ") + 1 or len(start)] if start[-1:].isalnum() else start  # not inside a word
    return _told_apart(Pair(start, chosen[len(start) :], rejected[len(start) :], tools_of(row)), needs_answer)


def _says(answer: list[Message] | str) -> bool:
    messages = [{"content": answer}] if isinstance(answer, str) else answer
    return any(message["content"].strip() or message.get("tool_calls") for message in messages)


def _told_apart(pair: Pair, needs_answer: bool) -> Pair:
    if not pair.prompt:
        raise ValueError("'chosen' and 'rejected' have no prompt: add 'prompt', or begin both with it")
    if not _says(pair.chosen) or not _says(pair.rejected) or pair.chosen == pair.rejected:
        kind = NothingToLearn if needs_answer else ValueError  # in prediction every row has its answer
        raise kind("'chosen' and 'rejected' must both have an answer, and not the same one")
    return pair
