"""Instruction data from jsonl files, with the loss on the answer only.

A line is ``{"prompt": ..., "response": ...}`` or ``{"messages": [{"role": ..., "content": ...}, ...]}`` whose last message is the
assistant's. A further key ``"choices": [...]``, a list that contains the response, makes the row a multiple-choice question. Validation
and test then report how often the model, limited to the choices, picks the right one.
"""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_lora.data.batching import Example, LengthGroupedSampler, collate_answers, collate_prompts
from lightning_lora.data.chat import Message, encode_answer, encode_prompt
from lightning_lora.data.resuming import Position, ResumableLoader
from lightning_lora.storage.regular_files import WrongPath

SHAPE = 'a line is {"prompt": "...", "response": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'


class InstructionDataModule(LightningDataModule):
    """Prompts and answers from jsonl files, tokenized by the task's tokenizer (so the model is named once, in the task).

    A run that resumes inside an epoch goes on with the next rows. Their order depends on ``seed``, ``batch_size`` and the epoch. On several
    processes Lightning shuffles it once more, and each takes every n-th row: the order is the same on any number above one.

    Args:
        train: Training file.
        val: Validation file; without one there is no validation.
        test: Test file.
        predict: File with the prompts to answer; the test file by default.
        batch_size: Rows per batch.
        max_length: Longest row, in tokens of prompt and answer together. Longer rows are truncated, with a warning that counts them.
        seed: Seed of the order of the training rows.
        pad_to_multiple_of: Pad batches to lengths that are multiples of it, except in prediction. A compiler then sees few sizes.

    Raises:
        ValueError: A file is missing, empty or malformed, or truncation leaves a row without its answer. The message names file and line.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        batch_size: PositiveInt = 8,
        max_length: PositiveInt = 1024,
        seed: int = 0,
        pad_to_multiple_of: PositiveInt = 1,
    ) -> None:
        super().__init__()
        self.files = {"train": train, "val": val, "test": test, "predict": predict or test}
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed
        self.pad_to_multiple_of = pad_to_multiple_of
        self.examples: dict[str, list[Example]] = {}
        self.position = Position()

    @override
    def setup(self, stage: str) -> None:
        splits = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}[stage]
        for split in splits:
            file = self.files[split]
            if file is None and (stage, split) == ("fit", "val"):
                continue  # only validation within fit is optional
            if file is None:
                raise ValueError(f"data.{split} is not set; {getattr(stage, 'value', stage)} needs a jsonl file there")
            if split not in self.examples:
                self.examples[split] = load_examples(file, self._tokenizer, self.max_length, split)

    @property
    def _tokenizer(self) -> Any:
        module = self.trainer.lightning_module if self.trainer is not None else None
        tokenizer = getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                f"InstructionDataModule takes its tokenizer from the LightningModule, but {type(module).__name__} has no "
                "`tokenizer`; set self.tokenizer there, or use CausalLMTask"
            )
        return tokenizer

    def _loader(self, split: str) -> DataLoader:
        examples, pad = self.examples[split], self._tokenizer.pad_token_id
        if split == "predict":  # keep the file's order
            return DataLoader(examples, batch_size=self.batch_size, collate_fn=partial(collate_prompts, pad=pad))  # type: ignore[arg-type]
        epoch = (lambda: self.trainer.current_epoch) if split == "train" else None  # type: ignore[union-attr]
        sampler = LengthGroupedSampler([len(e) for e in examples], self.batch_size, epoch, self.seed)
        collate = partial(collate_answers, pad=pad, multiple=self.pad_to_multiple_of)
        options: dict[str, Any] = {"batch_size": self.batch_size, "sampler": sampler, "collate_fn": collate}
        if split != "train":
            return DataLoader(examples, **options)  # type: ignore[arg-type]
        return ResumableLoader(examples, self.position, **options)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch."""
        return self.position.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin the next epoch at a position."""
        self.position.load_state_dict(state_dict)

    @override
    def train_dataloader(self) -> DataLoader:
        return self._loader("train")

    @override
    def val_dataloader(self) -> DataLoader | list:
        return self._loader("val") if "val" in self.examples else []

    @override
    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    @override
    def predict_dataloader(self) -> DataLoader:
        return self._loader("predict")


def load_examples(file: str | Path, tokenizer: Any, max_length: int, split: str) -> list[Example]:
    """Read and encode a jsonl file.

    Args:
        file: The file.
        tokenizer: A Hugging Face tokenizer.
        max_length: Longest row, in tokens.
        split: "train", "val", "test" or "predict". Prediction needs no answers; training ignores choices.

    Raises:
        ValueError: See `InstructionDataModule`.
    """
    path = Path(file)
    if path.is_dir() or not path.exists():
        raise WrongPath(f"data.{split}={str(file)!r}: {'this is a folder; name a jsonl file' if path.is_dir() else 'no such file'}")
    examples: list[Example] = []
    lost: list[str] = []
    cut = 0
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            example = _encode(json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")), tokenizer, split)
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error.msg} at column {error.colno}); {SHAPE}") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        room = max_length - len(example.prompt)
        if len(example) > max_length:
            cut += 1
            # A model can learn from a truncated answer, but a truncated choice or prompt cannot be evaluated.
            if room <= 0 or example.rivals or split == "predict":
                lost.append(f"{where} ({len(example)} tokens)")
            example.answer = example.answer[: max(room, 0)]
        examples.append(example)
    if not examples:
        raise ValueError(f"data.{split}={str(file)!r} is empty; {SHAPE}")
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(examples)} rows lose their answer to max_length={max_length}: {', '.join(lost[:5])}"
            f"{', ...' if len(lost) > 5 else ''}; raise data.max_length or shorten their prompts"
        )
    if cut:
        warnings.warn(f"{path}: {cut} of {len(examples)} rows are cut to max_length={max_length} tokens", stacklevel=2)
    return examples


def _encode(row: Any, tokenizer: Any, split: str) -> Example:
    """Encode one parsed line."""
    messages, answer = _conversation(row, needs_answer=split != "predict")
    example = Example(encode_prompt(tokenizer, messages), text=messages[-1]["content"])
    if not example.prompt:
        raise ValueError("the prompt has no tokens; give the model something to answer")
    if split == "predict":
        return example
    example.answer = encode_answer(tokenizer, messages, answer)
    if "choices" in row:
        choices = row["choices"]
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices) or answer not in choices:
            raise ValueError(f"'choices' must be a list of texts that holds the answer {answer!r}, got {choices!r}")
        if split != "train":
            example.rivals = _rivals(tokenizer, messages, answer, example.answer, choices)
    return example


def _conversation(row: Any, needs_answer: bool) -> tuple[list[Message], str]:
    """The messages before the answer, and the answer ("" where none is needed)."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}; {SHAPE}")
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
            raise ValueError(f"'messages' must be a list of objects with 'role' and 'content'; {SHAPE}")
        if not all(isinstance(m["role"], str) for m in messages):
            raise ValueError(f"every 'role' must be text such as \"user\"; {SHAPE}")
        if messages and messages[-1]["role"] == "assistant":
            messages, answer = messages[:-1], messages[-1]["content"]
        elif needs_answer:
            raise ValueError("the last of 'messages' must be the assistant's answer; add it")
        else:
            answer = ""
    else:
        missing = [key for key in ("prompt", "response") if key not in row and (needs_answer or key == "prompt")]
        if missing:
            raise ValueError(f"no {' and no '.join(map(repr, missing))} among the keys {sorted(row)}; {SHAPE}")
        messages, answer = [{"role": "user", "content": row["prompt"]}], row.get("response", "")
    if not messages or not all(isinstance(m["content"], str) for m in messages):
        raise ValueError(f"the prompt must be text; {SHAPE}")
    if needs_answer and (not isinstance(answer, str) or not answer):
        raise ValueError(f"the answer is {answer!r}; it must be a text that is not empty, or there is nothing to learn")
    return messages, answer


def _rivals(tokenizer: Any, messages: list[Message], answer: str, ids: list[int], choices: list[str]) -> list[tuple[int, int]]:
    """Return for every other choice the index of its first token that differs from the answer, and that token (see `Example`)."""
    rivals = set()
    for choice in choices:
        if choice == answer:
            continue
        other = encode_answer(tokenizer, messages, choice)
        index = next((i for i, (mine, theirs) in enumerate(zip(ids, other, strict=False)) if mine != theirs), None)
        if index is None:
            raise ValueError(f"the choices {answer!r} and {choice!r} begin with the same tokens and cannot be told apart; reword one")
        rivals.add((index, other[index]))
    return sorted(rivals)
