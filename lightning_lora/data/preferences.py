"""Pairs of a better and a worse answer to one prompt, for preference tasks such as DPO."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from typing_extensions import override

from lightning_lora.data.batching import Example, collate_answers, collate_prompts
from lightning_lora.data.chat import Chat
from lightning_lora.data.file_data import FileDataModule
from lightning_lora.data.records import Conversation, Message, NothingToLearn, Pair, Record
from lightning_lora.data.shown import Part, by_token
from lightning_lora.data.store import Examples
from lightning_lora.data.templates import check_template, set_template
from lightning_lora.ops.cross_entropy import IGNORE


@dataclass
class PairExample:
    """An encoded pair. Each answer is there with the prompt; labels are as in `Example`. In prediction there is a prompt only."""

    chosen: list[int]
    chosen_labels: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    rejected_labels: list[int] = field(default_factory=list)
    text: str = ""

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


class PreferenceDataModule(FileDataModule):
    """Rows with ``prompt``, ``chosen`` and ``rejected``: texts, or lists of messages.

    What is learnt is the assistant's part of the answers. A batch has the better answers first and then the worse ones, so twice
    ``batch_size`` rows.

    Args:
        *args: Those of `FileDataModule`.
        template: Name of a chat template, or the template itself, in place of the tokenizer's. A tokenizer without one gets "plain".
        chat_template_kwargs: Further variables of the template, such as ``enable_thinking``.
        **kwargs: Those of `FileDataModule`.

    Examples:
        >>> data = PreferenceDataModule("rows/pairs.jsonl", batch_size=2)
        >>> task = DPOTask("models/llama")
        >>> L.Trainer(max_epochs=1, callbacks=[LoRACallback(LoRAConfig(target_modules="all-linear"))]).fit(task, data)
        >>> len(next(iter(data.train_dataloader()))["input_ids"])  # two better answers, two worse ones
        4
    """

    records = (Pair, Conversation)
    example = PairExample

    def __init__(self, *args: Any, template: str | None = None, chat_template_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_template(template)
        self.template, self.chat_template_kwargs = template, chat_template_kwargs

    @cached_property
    def chat(self) -> Chat:
        """The task's tokenizer with its template."""
        if self.template is not None:
            set_template(self.tokenizer, self.template)
        return Chat(self.tokenizer, self.chat_template_kwargs)

    @override
    def load(self, split: str, say: bool = True) -> Examples:
        self.chat  # noqa: B018 (it may set the tokenizer's template, of which the name in the cache depends)
        return super().load(split, say)

    @override
    def encode(self, record: Record, split: str) -> Sequence[PairExample]:
        assert isinstance(record, (Pair, Conversation))
        if split == "predict":
            messages = record.messages if isinstance(record, Conversation) else _turns(record.prompt, "user")
            return [PairExample(self.chat.prompt(messages, record.tools), text=messages[-1]["content"])]
        if isinstance(record, Conversation):
            raise ValueError("the row has no 'chosen' and 'rejected'; add them, or name their columns with data.columns")
        chosen, rejected = (self._answered(record, answer) for answer in (record.chosen, record.rejected))
        if chosen.ids == rejected.ids:  # the template strips texts, or the tokenizer normalizes them
            raise NothingToLearn("'chosen' and 'rejected' are the same tokens, so there is nothing to prefer")
        return [PairExample(chosen.ids, chosen.labels, rejected.ids, rejected.labels)]

    def _answered(self, pair: Pair, answer: list[Message] | str) -> Example:
        """Encode the prompt with one of the answers. A prompt and an answer that are raw texts get no chat template."""
        if isinstance(pair.prompt, str) and isinstance(answer, str):
            return self._raw(pair.prompt, answer)
        before = _turns(pair.prompt, "user")
        examples = self.chat.examples(Conversation([*before, *_turns(answer, "assistant")], pair.tools, given=len(before)))
        if len(examples) > 1:
            raise ValueError("the tokenizer's chat template rewrites turns when more follow; answer in one turn")
        return examples[0]

    def _raw(self, prompt: str, answer: str) -> Example:
        end = self.tokenizer.eos_token_id
        before, after = self.tokenizer(prompt)["input_ids"], self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if end is not None:  # some tokenizers append the end token to every text
            before, after = before[:-1] if before[-1:] == [end] else before, [*after, end]
        if not before:
            raise ValueError("'chosen' and 'rejected' begin differently, so there is no prompt; add 'prompt'")
        return Example(before + after, [IGNORE] * len(before) + after)

    @override
    def fits(self, example: PairExample, split: str) -> str | None:
        if len(example) <= self.max_length:
            return None
        for tokens in (example.chosen, example.chosen_labels, example.rejected, example.rejected_labels):
            del tokens[self.max_length :]
        labels = (example.chosen_labels, example.rejected_labels)
        nothing = example.chosen == example.rejected or any(all(label == IGNORE for label in answer) for answer in labels)
        return "lost" if split == "predict" or nothing else "cut"

    @override
    def parts(self, example: PairExample) -> Iterator[Part]:
        for name, ids, labels in (
            ("chosen", example.chosen, example.chosen_labels),
            ("rejected", example.rejected, example.rejected_labels),
        ):
            yield f"{name}:\n", False
            yield from by_token(self.tokenizer, ids, labels)
            yield "\n", False

    @override
    def collate(self, examples: Sequence[PairExample], split: str) -> dict[str, Any]:
        pad = self.tokenizer.pad_token_id
        if split == "predict":
            return collate_prompts([Example(e.chosen, text=e.text) for e in examples], pad)
        answers = [Example(e.chosen, e.chosen_labels) for e in examples] + [Example(e.rejected, e.rejected_labels) for e in examples]
        return collate_answers(answers, pad, self.pad_to_multiple_of)


def _turns(value: list[Message] | str, role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value
