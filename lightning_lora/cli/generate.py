"""`generate`: answer one prompt, or each prompt of a file. Stdout gets nothing but answers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from lightning_lora.cli.answers import Answerer, Sampling, write_out
from lightning_lora.cli.console import print_json, working
from lightning_lora.cli.messages import usage
from lightning_lora.cli.tuned import load_tuned
from lightning_lora.data.formats import to_record
from lightning_lora.data.reading import read_rows, text_of_file
from lightning_lora.data.records import CALLED, Conversation, Message
from lightning_lora.tasks.hf import DType


def generate(
    model: str,
    prompt: str | None = None,
    adapter: str | None = None,
    system: str | None = None,
    file: str | None = None,
    batch_size: PositiveInt = 8,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    gguf_file: str | None = None,
    dtype: DType = "auto",
    json: bool = False,
) -> None:
    """Print a model's answer to one prompt, as it is generated, or its answers to a file's prompts.

    Args:
        model: A hub id or a local folder.
        prompt: The user's message; read from stdin if neither it nor a file is given.
        adapter: An adapter folder or a checkpoint (.ckpt); without one the base model answers.
        system: The system message, for models with a chat template. A row's own takes its place.
        file: Prompts to answer: a text file with one per line, or rows as ``predict`` reads them.
        batch_size: Rows of the file that are answered together.
        sampling: How answers are generated; its fields are options.
        gguf_file: A GGUF file in the model's folder.
        dtype: The weights' dtype.
        json: Print one JSON object per answer, with prompt and response.

    Raises:
        ValueError: There is no prompt, a path does not exist, or the adapter does not fit the model.
    """
    conversations = _conversations(prompt, file, system)
    answerer = Answerer(load_tuned(model, adapter, gguf_file, dtype), sampling)
    if file is None and not json:
        answerer.stream(conversations[0], write_out)
        print()
        return
    for start in range(0, len(conversations), batch_size):
        batch = conversations[start : start + batch_size]
        with working(f"answering {start + len(batch)} of {len(conversations)}"):
            answers = answerer.answer(batch)
        for conversation, answer in zip(batch, answers, strict=True):
            if json:
                print_json({"prompt": conversation.messages[-1]["content"], "response": answer})
            else:
                print(answer, flush=True)


def _conversations(prompt: str | None, file: str | None, system: str | None) -> list[Conversation]:
    """Return what is to be answered."""
    if prompt is not None and file is not None:
        raise ValueError("a prompt and --file are both given; leave one out")
    if file is None and prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    if file is not None:
        with usage():
            found = list(_read(Path(file)))
        own = [each.messages[0]["role"] == "system" for each in found]
        return [each if has else replace(each, messages=[*first, *each.messages]) for each, has in zip(found, own, strict=True)]
    if not prompt:
        raise ValueError("the prompt is empty; give the model something to answer")
    return [Conversation([*first, {"role": "user", "content": prompt}])]


def _read(file: Path) -> Iterator[Conversation]:
    """Yield the prompts of a file.

    Raises:
        ValueError: There is no such file, it has no prompt, or a row is malformed. The message names file and line.
    """
    if file.suffix and not file.exists():
        raise ValueError(f"file={str(file)!r}: no such file")
    if file.suffix == ".txt":
        lines = text_of_file(file).split("\n")
        rows: Iterable[tuple[str, Any]] = [(f"{file}:{number}", {"prompt": line}) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        rows = read_rows(str(file), "predict")
    empty = True
    for place, row in rows:
        try:
            record = to_record(row, needs_answer=False)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if not isinstance(record, Conversation):
            raise ValueError(f"{place}: {CALLED[type(record)]} is nothing to answer; give it a key prompt or messages")
        empty = False
        yield record
    if empty:
        raise ValueError(f"{file} has no prompts; write one per line")
