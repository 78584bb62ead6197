"""Chat templates by name, for base models that have none.

A template that writes its turns with special tokens fits only tokenizers that know these tokens. The others end a turn with the
tokenizer's own end token and fit every tokenizer.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from lightning_lora.storage.regular_files import WrongPath

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


def _folded(user: str, assistant: str, end: str, answer: str = "") -> str:
    """Return a template without system turns: the system message begins the first question."""
    return (
        f"{_LOOP}{{% set first = messages[0]['content'] + '\n\n' if loop.index0 == 1 and messages[0]['role'] == 'system' else '' %}}"
        "{% set text = first + message['content'] %}"
        f"{{% if message['role'] == 'assistant' %}}{assistant}{{{{ '{answer}' + text + {end} }}}}"
        f"{{% elif message['role'] == 'user' %}}{{{{ {user} }}}}"
        "{% elif message['role'] != 'system' or loop.index0 > 0 %}"
        "{{ raise_exception('this template knows the roles user, assistant and, at the beginning, system') }}{% endif %}"
        f"{_PROMPT}{assistant}{{% endif %}}"
    )


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
    "gemma": _folded("'<start_of_turn>user\n' + text + '<end_of_turn>\n'", "<start_of_turn>model\n", "'<end_of_turn>\n'"),
    "mistral": _folded("'[INST] ' + text + '[/INST]'", "", "eos_token", answer=" "),
}
# Special tokens that a template writes, beside the end token.
TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>"), "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}
TOKENS |= {
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": ("[INST]", "[/INST]"),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
}


def set_template(tokenizer: Any, template: str) -> None:
    """Give a tokenizer a chat template. It stays there, so that generation and exports use it too.

    Args:
        tokenizer: A Hugging Face tokenizer.
        template: A name in `TEMPLATES`, a file whose name ends in ``.jinja``, or a template itself.

    Raises:
        WrongPath: There is no such file.
        ValueError: The name is unknown, or the tokenizer lacks a token that the template writes.
    """
    if "{" in template or template.endswith(".jinja"):
        return _set_own(tokenizer, template)
    check_template(template)
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


def check_options(template: Any, options: dict[str, Any]) -> None:
    """Raise ValueError if a template does not read one of ``data.chat_template_kwargs``, which then has no effect."""
    names = set(re.findall(r"[A-Za-z_]\w*", str(template)))
    for name in options:
        if name in ("messages", "tools", "add_generation_prompt"):
            raise ValueError(f"data.chat_template_kwargs sets {name!r}, which comes from the rows; leave it out")
        if name not in names:
            close = difflib.get_close_matches(name, names, 1, 0.7)
            hint = f"did you mean {close[0]!r}?" if close else "leave it out"
            raise ValueError(f"data.chat_template_kwargs sets {name!r}, which the tokenizer's chat template does not read; {hint}")


def check_template(template: str | None) -> None:
    """Raise ValueError if a template is neither a known name nor a template of the user's own."""
    if template is not None and "{" not in template and not template.endswith(".jinja") and template not in TEMPLATES:
        raise ValueError(f"data.template={template!r} is not known; the names are {', '.join(TEMPLATES)}, or give a Jinja template")


def _set_own(tokenizer: Any, template: str) -> None:
    """Set a user's template, from its file if it is one."""
    if "{" not in template:
        file = Path(template)
        if not file.is_file():
            raise WrongPath(f"data.template={template!r}: no such file (seen from {Path.cwd()})")
        template = file.read_text(encoding="utf-8")
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        tokenizer.chat_template = before
        raise ValueError(f"data.template is no Jinja template: {error.message} in line {error.lineno}") from error
    except TemplateError:
        return  # it refuses this conversation, and may take the rows' own
