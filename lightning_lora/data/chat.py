"""From a conversation to token ids: the prompt the model reads, the answer it is taught.

Prompt and answer are tokenized apart, because that is what happens at inference: the model is handed the prompt's tokens and writes
the answer's. Tokenizing the whole text and cutting it would teach tokens that straddle the border, which generation never meets.
"""

from __future__ import annotations

from typing import Any

Message = dict[str, str]


def encode_prompt(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of everything before the answer.

    Args:
        tokenizer: A Hugging Face tokenizer; its chat template is used if it has one.
        messages: The conversation up to the answer. Without a chat template: exactly one message, taken as it is.

    Raises:
        ValueError: Several messages, and a tokenizer that has no template to write them with.
    """
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written the special tokens
    if len(messages) != 1:
        raise ValueError(f"{len(messages)} messages before the answer, but the tokenizer has no chat template; use prompt/response rows")
    ids = tokenizer(messages[0]["content"])["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers close every text


def encode_answer(tokenizer: Any, messages: list[Message], answer: str) -> list[int]:
    """Token ids of the answer to ``messages``, with the token that ends it.

    Raises:
        ValueError: The chat template does not write the answer right after its own generation prompt.
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
    if tokenizer.eos_token_id in ids:  # generation stops here, so what the template writes behind it is never wanted
        ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
    return ids
