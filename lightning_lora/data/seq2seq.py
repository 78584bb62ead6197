"""Texts to write from texts, for models with encoder and decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from typing_extensions import override

from lightning_lora.data.batching import Example, cut_ids, pad_right
from lightning_lora.data.file_data import FileDataModule
from lightning_lora.data.records import Conversation, Message, Record
from lightning_lora.data.shown import Part, text_of
from lightning_lora.ops.cross_entropy import IGNORE


class Seq2SeqDataModule(FileDataModule):
    """Rows with a source and a target: ``prompt`` and ``response``, or another format of conversations. The last answer is the target.

    Name other columns with ``data.columns``, such as ``{document: prompt, summary: response}``.

    Args:
        *args: Those of `FileDataModule`.
        source_prefix: Text before every source, as T5's "summarize: ". By default that of the checkpoint or adapter that the task comes
            from, or none.
        max_target_length: Longest target, in tokens; ``max_length`` is the source's.
        **kwargs: Those of `FileDataModule`.

    Examples:
        >>> data = Seq2SeqDataModule("rows/texts.jsonl", source_prefix="name the colour ", batch_size=2)
        >>> task = Seq2SeqTask("models/t5")
        >>> L.Trainer(max_epochs=1, callbacks=[LoRACallback(LoRAConfig(target_modules="all-linear"))]).fit(task, data)
        >>> len(next(iter(data.train_dataloader()))["input_ids"])
        2
    """

    records = (Conversation,)

    def __init__(self, *args: Any, source_prefix: str | None = None, max_target_length: PositiveInt = 256, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.source_prefix, self.max_target_length = source_prefix, max_target_length

    @override
    def prepare_data(self) -> None:
        self._agree()  # this process encodes before `setup`
        super().prepare_data()

    @override
    def setup(self, stage: str) -> None:
        self._agree()
        super().setup(stage)

    def _agree(self) -> None:
        """Tell the task the prefix, or take its own."""
        task: Any = self.trainer.lightning_module if self.trainer is not None else None
        if self.source_prefix is None:
            self.source_prefix = getattr(task, "source_prefix", "")
        elif hasattr(task, "source_prefix"):
            task.source_prefix = self.source_prefix

    @override
    def encode(self, record: Record, split: str) -> Sequence[Example]:
        assert isinstance(record, Conversation)
        if record.tools or any(message.get("tool_calls") for message in record.messages):
            raise ValueError("the row has tools or calls of them, and this module reads and writes texts; leave the row out")
        before = record.messages if split == "predict" else record.messages[:-1]
        source = source_of(before)
        ids = self.tokenizer((self.source_prefix or "") + source)["input_ids"]
        if split == "predict":
            return [Example(ids, text=source)]
        answer = record.messages[-1]
        if "weight" in answer:
            raise ValueError("the answer has weight 0, and there is nothing else to learn; leave the row out")
        target = answer["content"]
        labels = self.tokenizer(text_target=target)["input_ids"]
        end = self.tokenizer.eos_token_id
        if end is not None and end not in labels[-1:]:  # or the model would not learn to stop
            labels = [*labels, end]
        return [Example(ids, labels, text="" if split == "train" else target)]

    @override
    def fits(self, example: Example, split: str) -> str | None:
        if len(example) <= self.max_length and len(example.labels) <= self.max_target_length:
            return None
        example.ids = cut_ids(example.ids, self.max_length, self.tokenizer)
        example.labels = cut_ids(example.labels, self.max_target_length, self.tokenizer)
        return "cut"

    @override
    def parts(self, example: Example) -> Iterator[Part]:
        yield f"{text_of(self.tokenizer, example.ids)}\n", False
        yield text_of(self.tokenizer, example.labels), True

    @override
    def collate(self, examples: Sequence[Example], split: str) -> dict[str, Any]:
        multiple = 1 if split == "predict" else self.pad_to_multiple_of
        batch: dict[str, Any] = pad_right([e.ids for e in examples], self.tokenizer.pad_token_id, multiple)
        if split == "predict":
            return {**batch, "sources": [e.text for e in examples]}
        longest = -(-max(len(e.labels) for e in examples) // multiple) * multiple
        batch["labels"] = torch.tensor([e.labels + [IGNORE] * (longest - len(e.labels)) for e in examples])
        return batch if split == "train" else {**batch, "targets": [e.text for e in examples]}


def source_of(messages: Sequence[Message]) -> str:
    """Return the text that an encoder reads: the messages, one per line."""
    return "\n".join(message["content"] for message in messages)
