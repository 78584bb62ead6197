"""Encode a conversation as token ids: the prompt that the model reads, and the answer that it learns.

Prompt and answer are tokenized separately, as at inference: the model gets the prompt's tokens and generates the answer's. If the full
text were tokenized and then split, a token could span prompt and answer. Generation never produces such a token.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

Message = dict[str, str]


def encode_prompt(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Return the token ids of everything before the answer.

    Args:
        tokenizer: A Hugging Face tokenizer; its chat template is used if it has one.
        messages: The conversation up to the answer. Without a chat template: exactly one message, encoded unchanged.

    Raises:
        ValueError: There are several messages, and the tokenizer has no chat template; or its template refuses them.
    """
    if tokenizer.chat_template:
        text = _rendered(tokenizer, messages, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written the special tokens
    if len(messages) != 1:
        raise ValueError(f"{len(messages)} messages before the answer, but the tokenizer has no chat template; use prompt/response rows")
    ids = tokenizer(messages[0]["content"])["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers append the end token to every text


def encode_answer(tokenizer: Any, messages: list[Message], answer: str) -> list[int]:
    """Return the token ids of the answer to ``messages``, with the end token.

    Raises:
        ValueError: The chat template refuses the messages, changes the answer, or does not put it directly after its generation prompt; or
            the tokenizer has neither template nor end token.
    """
    if not tokenizer.chat_template:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token (eos_token), so that no answer would end; set one")
        return tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    prompt = _rendered(tokenizer, messages, add_generation_prompt=True)
    whole = _rendered(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    if not whole.startswith(prompt):
        raise ValueError(
            "the tokenizer's chat template does not put the assistant's answer after its generation prompt "
            f"(which ends in {prompt[-40:]!r}); set tokenizer.chat_template to one that does"
        )
    if answer.strip() not in whole[len(prompt) :]:
        raise ValueError(
            f"the tokenizer's chat template changes the answer {answer[:40]!r} (as some cut out reasoning); it would be learned so"
        )
    ids = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id in ids:  # generation stops here, so the template's text after it is cut
        ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
    return ids


def _rendered(tokenizer: Any, messages: list[Message], add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the tokenizer's chat template refuses the messages ({roles}): {error}") from error
