"""Generate answers: sampling options, stop tokens, and text that is printed while it is generated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveInt

from lightning_lora.cli.tuned import Tuned
from lightning_lora.data.batching import Example, collate_prompts, pad_right
from lightning_lora.data.chat import encode_prompt, stop_tokens
from lightning_lora.data.limits import check_token
from lightning_lora.data.records import Conversation
from lightning_lora.data.seq2seq import source_of


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        temperature: Randomness of the draws; 0 takes the most probable token.
        top_p: Draw among the most probable tokens that have this share of the probability together.
        seed: Seed of the draws; without one each run draws anew.
    """

    max_new_tokens: PositiveInt = 256
    temperature: NonNegativeFloat = 0.0
    top_p: ClosedUnitInterval = 1.0
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """Return the arguments of ``generate``."""
        drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"max_new_tokens": self.max_new_tokens, **(drawn if self.temperature else greedy)}


class Answerer:
    """A model that writes texts, and how it does so.

    Args:
        tuned: The model.
        sampling: How tokens are chosen.

    Raises:
        ValueError: The model writes no texts.
    """

    def __init__(self, tuned: Tuned, sampling: Sampling) -> None:
        if not hasattr(type(tuned.network), "generate") or not tuned.network.can_generate():
            raise ValueError(f"{type(tuned.network).__name__} writes no texts; use lightning-lora predict with the run's config")
        self.network, self.tokenizer, self.sampling = tuned.network, tuned.preprocessor, sampling
        self.prefix = tuned.task.source_prefix
        self.encodes = bool(self.network.config.is_encoder_decoder)  # the prompt is the encoder's, and no part of the output
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)

    def answer(self, conversations: Sequence[Conversation]) -> list[str]:
        """Return the answers to a batch of conversations."""
        return [self._text(row) for row in self._generate(conversations)]

    def stream(self, conversation: Conversation, write: Callable[[str], object]) -> str:
        """Return the answer to one conversation. Pass its text to ``write`` as it is generated."""
        (row,) = self._generate([conversation], Streamer(self.tokenizer, write))
        return self._text(row)

    def _generate(self, conversations: Sequence[Conversation], streamer: Any = None) -> Any:
        """Return the generated token ids, (B, T)."""
        rows, pad = [self._encode(each) for each in conversations], self.tokenizer.pad_token_id
        batch = pad_right(rows, pad) if self.encodes else collate_prompts([Example(ids) for ids in rows], pad)  # as in training
        device, options = self.network.device, self.sampling.options()
        options["max_new_tokens"] = self._room(batch["input_ids"].shape[1])
        with torch.inference_mode():
            output = self.network.generate(
                input_ids=batch["input_ids"].to(device),
                attention_mask=batch["attention_mask"].to(device),
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=stop_tokens(self.network, self.tokenizer) or None,
                streamer=streamer,
                **options,
            )
        return output if self.encodes else output[:, batch["input_ids"].shape[1] :]

    def _room(self, prompt: int) -> int:
        """Return how many tokens an answer may have behind a prompt of so many: past its last position a model may fail, or write nonsense.

        Raises:
            ValueError: The prompt fills the context.
        """
        context = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        room = self.sampling.max_new_tokens if context is None else context - (0 if self.encodes else prompt)
        if room < 1 or (context is not None and prompt > context):
            raise ValueError(f"the prompt has {prompt} tokens, the model's context {context}; shorten it")
        return min(room, self.sampling.max_new_tokens)

    def _encode(self, conversation: Conversation) -> list[int]:
        for message in conversation.messages:
            try:
                message["content"].encode()
            except UnicodeEncodeError as error:  # bytes of a pipe or an argument that Python could not read, which no tokenizer takes
                raise ValueError(
                    f"the message of {message['role']!r} is not UTF-8 (at character {error.start}); give it as UTF-8"
                ) from error
        if self.encodes:
            ids = self.tokenizer(self.prefix + source_of(conversation.messages))["input_ids"]
        else:
            ids = encode_prompt(self.tokenizer, conversation.messages, conversation.tools)
        check_token(self.network, self.tokenizer, max(ids, default=0), "the prompt")
        return ids

    def _text(self, ids: Any) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class Streamer:
    """Pass text on as soon as its tokens are complete: transformers calls ``put`` with each token, and ``end``.

    All ids are decoded each time, since a character may take several tokens and a token's text may depend on the one before.

    Args:
        tokenizer: Decodes the tokens.
        write: Takes the new text.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.written = ""
        self._prompt = True  # the first call brings the prompt

    def put(self, ids: Any) -> None:
        """Take the next token."""
        if self._prompt:
            self._prompt = False
            return
        self.ids += ids.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd") and text.startswith(self.written):  # else a character is incomplete
            self._pass(text)

    def end(self) -> None:
        """Pass on what is left."""
        self._pass(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _pass(self, text: str) -> None:
        new = text[len(self.written) :]
        if new:
            self.write(new)
        self.written = text


def write_out(text: str) -> None:
    """Write to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
