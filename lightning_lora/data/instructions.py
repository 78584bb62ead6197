"""Conversations, instructions and texts for causal language models, with the loss on what the model is to write.

`lightning_lora.data.formats` has the formats of rows. A further key ``"choices": [...]``, a list that contains the answer, makes a row a
multiple-choice question. Validation and test then report how often the model, limited to the choices, picks the right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_lora.data.batching import Example, LengthGroupedSampler, collate_answers, collate_prompts
from lightning_lora.data.chat import Chat, TrainOn
from lightning_lora.data.file_data import FileDataModule
from lightning_lora.data.packing import PackedRows
from lightning_lora.data.records import Conversation, PlainText, Record
from lightning_lora.data.store import Examples
from lightning_lora.data.stream import Stream
from lightning_lora.data.templates import check_template, set_template


class InstructionDataModule(FileDataModule):
    """Rows for a causal language model: conversations with the loss on the answers, or plain texts with the loss on every token.

    Args:
        *args: Those of `FileDataModule`.
        template: Name of a chat template, or the template itself, in place of the tokenizer's. A tokenizer without one gets "plain".
        chat_template_kwargs: Further variables of the template, such as ``enable_thinking``.
        train_on: Learn every answer of a conversation ("assistant"), its last one, or all its tokens.
        packing: Train on rows of one length, each with several examples that do not see one another (`lightning_lora.data.packing`).
            ``batch_size`` counts these rows. Validation is not packed.
        pack_length: Tokens per packed row; ``max_length`` by default.
        **kwargs: Those of `FileDataModule`.

    Raises:
        ValueError: See `FileDataModule`. Or packed rows are too short for the longest example. Or the template is unknown or refuses a row.

    Examples:
        >>> data = InstructionDataModule("rows/chat.jsonl", val=0.2, batch_size=2, max_length=64)
        >>> task = CausalLMTask("models/llama")
        >>> L.Trainer(max_epochs=1, callbacks=[LoRACallback(LoRAConfig(target_modules="all-linear"))]).fit(task, data)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["labels"].shape == batch["input_ids"].shape  # (B, T); -100 where nothing is learnt
        True
    """

    records = (Conversation, PlainText)

    def __init__(
        self,
        *args: Any,
        template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        train_on: TrainOn = "assistant",
        packing: bool = False,
        pack_length: PositiveInt | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_template(template)
        if packing and self.streaming:
            raise ValueError("data.packing=True looks at every row before training; set data.streaming: false, or leave it out")
        self.packing, self.pack_length = packing, _pack_length(packing, pack_length, self.max_length, self.pad_to_multiple_of)
        self.template, self.chat_template_kwargs, self.train_on = template, chat_template_kwargs, train_on
        self._chat: Chat | None = None

    @property
    def chat(self) -> Chat:
        """The task's tokenizer with its template."""
        if self._chat is None or self._chat.tokenizer is not self.tokenizer:
            if self.template is not None:
                set_template(self.tokenizer, self.template)
            self._chat = Chat(self.tokenizer, self.chat_template_kwargs)
        return self._chat

    @override
    def load(self, split: str, say: bool = True) -> Examples:
        self._set_template(split)
        return super().load(split, say)

    @override
    def stream(self) -> Stream:
        self._set_template("train")
        return super().stream()

    def _set_template(self, split: str) -> None:
        """Set the tokenizer's template before the first row. It is saved with the adapter, and rows from the cache set none.

        Without a name, a tokenizer that has no template gets the plain one if the first row is a conversation.
        """
        if self.template is None:
            if self.tokenizer.chat_template or self.tokenizer.eos_token is None:  # the plain one needs an end token: the row says so
                return
            sources, streaming = self._sources(split), self.streaming and split == "train"
            rows = (row for source in sources for _, row in self.read(source, split, streaming))
            try:
                if not isinstance(self.record_of(next(iter(rows), None), split), Conversation):
                    return
            except ValueError:
                return  # the row is refused where all are read, with its place
        self.chat  # noqa: B018

    @override
    def encode(self, record: Record, split: str) -> Sequence[Example]:
        if isinstance(record, PlainText):
            return self._text(record.text, split)
        assert isinstance(record, Conversation)
        if split == "predict":
            ids = self.chat.prompt(record.messages, record.tools)
            if not ids:
                raise ValueError("the prompt has no tokens; give the model something to answer")
            return [Example(ids, text=record.messages[-1]["content"])]
        examples = self.chat.examples(record, self.train_on)
        if record.choices and split != "train":
            examples[-1].rivals = self._rivals(record, examples[-1])
        return examples

    def _text(self, text: str, split: str) -> list[Example]:
        """Encode a text as the tokenizer begins texts, with its end token. A text of whitespace only, or of one token in all, is empty."""
        if not text.strip():
            return []
        ids, end = self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id
        if ids[-1:] == [end]:  # some tokenizers append the end token to every text
            ids.pop()
        if split == "predict":
            return [Example(ids, text=text)]
        ids += [] if end is None else [end]
        return [Example(ids, list(ids))] if len(ids) > 1 else []  # nothing predicts a first token

    def _rivals(self, record: Conversation, example: Example) -> list[tuple[int, int]]:
        """Return for every other choice the index of its first token that differs from the answer, and that token (see `Example`)."""
        answer, rivals = record.messages[-1]["content"], set()
        mine = example.answer
        for choice in record.choices or []:
            if choice == answer:
                continue
            messages = [*record.messages[:-1], {**record.messages[-1], "content": choice}]
            theirs = self.chat.examples(replace(record, messages=messages), self.train_on)[-1].answer
            index = next((i for i, (one, other) in enumerate(zip(mine, theirs, strict=False)) if one != other), None)
            if index is None:
                raise ValueError(f"the choices {answer!r} and {choice!r} begin with the same tokens and cannot be told apart; reword one")
            rivals.add((index, theirs[index]))
        return sorted(rivals)

    @override
    def batching(self, split: str) -> dict[str, Any]:
        rows, pad = self.examples[split], self.tokenizer.pad_token_id
        options = super().batching(split)
        if split != "train" or not self.packing:
            return options
        assert isinstance(rows, Examples)  # a stream is not packed
        packed = PackedRows(rows, self.pack_length, self.batch_size, self.seed)
        rank_zero_info(f"data.packing: {packed}.")
        order = LengthGroupedSampler([self.pack_length] * len(packed), self.batch_size, options["sampler"].epoch, self.seed)
        return options | {"dataset": packed, "sampler": order, "collate_fn": partial(packed.collate, pad=pad)}

    @override
    def collate(self, examples: Sequence[Example], split: str) -> dict[str, Any]:
        pad = self.tokenizer.pad_token_id
        if split == "predict":
            return collate_prompts(examples, pad)
        rows = self.examples.get(split)
        choices = isinstance(rows, Examples) and rows.any_has("rivals")
        return collate_answers(examples, pad, self.pad_to_multiple_of, choices)


def _pack_length(packing: bool, length: int | None, longest: int, multiple: int) -> int:
    """Return the tokens per packed row."""
    if not packing and length is not None:
        raise ValueError(f"data.pack_length={length} has no effect without packing; set data.packing: true or leave it out")
    rows = length or longest
    if rows < longest:
        raise ValueError(f"data.pack_length={rows} is less than data.max_length={longest}, so an example may not fit; make them equal")
    if packing and rows % multiple:
        raise ValueError(f"data.pack_length={rows} is no multiple of data.pad_to_multiple_of={multiple}; use one that is")
    return rows
