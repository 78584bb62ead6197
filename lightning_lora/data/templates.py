"""Chat templates by name, for base models that have none.

A template that writes its turns with special tokens fits only tokenizers that know these tokens. The others end a turn with the
tokenizer's own end token and fit every tokenizer.
"""

from __future__ import annotations

from typing import Any

_LOOP = "{% for message in messages %}"
_PROMPT = "{% endfor %}{% if add_generation_prompt %}"


def _headings(system: str, user: str, assistant: str, gap: str = "\n\n", answer: str = "") -> str:
    """Return a template that announces each turn with a heading; only the assistant's turns end with the end token."""
    return (
        f"{_LOOP}{{% if message['role'] == 'assistant' %}}{assistant}{{{{ '{answer}' + message['content'] + eos_token + '{gap}' }}}}"
        f"{{% elif message['role'] == 'user' %}}{user}{{{{ message['content'] + '{gap}' }}}}"
        f"{{% elif message['role'] == 'system' %}}{system}{{{{ message['content'] + '{gap}' }}}}"
        "{% else %}{{ raise_exception('this template knows the roles system, user and assistant, not ' + message['role']) }}{% endif %}"
        f"{_PROMPT}{assistant}{{% endif %}}"
    )


def _turns(begin: str, between: str, end: str) -> str:
    """Return a template that writes every turn between special tokens."""
    head = f"{begin}{{{{ message['role'] }}}}{between}"
    return f"{_LOOP}{head}{{{{ message['content'] }}}}{end}{_PROMPT}{begin}assistant{between}{{% endif %}}"


#: The first one serves every model without a template. It says where the answer begins.
TEMPLATES = {
    "plain": _headings("", "", "### Response:\n"),
    "alpaca": _headings("", "### Instruction:\n", "### Response:\n"),
    "vicuna": _headings("", "USER: ", "ASSISTANT:", gap=" ", answer=" "),
    "zephyr": _LOOP
    + "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    + _PROMPT
    + "{{ '<|assistant|>\\n' }}{% endif %}",
    "chatml": _turns("<|im_start|>", "\n", "<|im_end|>\n"),
    "llama3": _turns("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
    "phi3": _turns("<|", "|>\n", "<|end|>\n"),
}
# Special tokens that a template writes, beside the end token.
TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>"), "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}
TOKENS |= {"phi3": ("<|user|>", "<|assistant|>", "<|end|>")}


def set_template(tokenizer: Any, template: str) -> None:
    """Give a tokenizer a chat template. It stays there, so that generation and exports use it too.

    Args:
        tokenizer: A Hugging Face tokenizer.
        template: A name in `TEMPLATES`, or a template itself (with ``{`` in it).

    Raises:
        ValueError: The name is unknown, or the tokenizer lacks a token that the template writes.
    """
    if "{" in template:
        tokenizer.chat_template = template
        return
    if template not in TEMPLATES:
        raise ValueError(f"data.template={template!r} is not known; the names are {', '.join(TEMPLATES)}, or give a Jinja template")
    known = tokenizer.get_vocab()
    missing = [token for token in TOKENS.get(template, ()) if token not in known]
    if missing:
        raise ValueError(
            f"data.template={template!r} writes {', '.join(missing)}, which the tokenizer does not have; "
            f"{', '.join(name for name in TEMPLATES if name not in TOKENS)} fit every tokenizer"
        )
    if tokenizer.eos_token is None and template not in TOKENS:
        raise ValueError("the tokenizer has no end token (eos_token), so that no answer would end; set one")
    start = tokenizer("a")["input_ids"][:1]  # a tokenizer that begins every text with a token of its own expects it here too
    begins = start == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + TEMPLATES[template]
