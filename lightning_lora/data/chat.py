"""Encode a conversation as token ids: the prompt that the model reads, and the answer that it learns.

Prompt and answer are tokenized separately, as at inference: the model gets the prompt's tokens and generates the answer's. If the full
text were tokenized and then split, a token could span prompt and answer. Generation never produces such a token.
"""

from __future__ import annotations

from typing import Any

Message = dict[str, str]


def encode_prompt(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Return the token ids of everything before the answer.

    Args:
        tokenizer: A Hugging Face tokenizer; its chat template is used if it has one.
        messages: The conversation up to the answer. Without a chat template: exactly one message, encoded unchanged.

    Raises:
        ValueError: There are several messages, and the tokenizer has no chat template.
    """
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written the special tokens
    if len(messages) != 1:
        raise ValueError(f"{len(messages)} messages before the answer, but the tokenizer has no chat template; use prompt/response rows")
    ids = tokenizer(messages[0]["content"])["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers append the end token to every text


def encode_answer(tokenizer: Any, messages: list[Message], answer: str) -> list[int]:
    """Return the token ids of the answer to ``messages``, with the end token.

    Raises:
        ValueError: The chat template does not put the answer directly after its generation prompt.
    """
    if not tokenizer.chat_template:
        return tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError(
            "the tokenizer's chat template does not put the assistant's answer after its generation prompt "
            f"(which ends in {prompt[-40:]!r}); set tokenizer.chat_template to one that does"
        )
    ids = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id in ids:  # generation stops here, so the template's text after it is cut
        ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
    return ids
