"""Encode a conversation as the model reads it: the tokens, and which of them it learns.

At inference the model reads the conversation up to an answer, as its chat template writes it, and generates the answer. So for every
answer the template is rendered twice: up to the answer, with its generation prompt, and including it. What the second has more, up to the
token that ends the turn, is learnt. An answer that is written otherwise once more turns follow (Qwen 3 drops the reasoning, Mistral moves
the tools) is learnt in an example of its own, which ends with it.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from typing import Any, Literal

from jinja2 import TemplateError

from lightning_lora.data.batching import Example
from lightning_lora.data.records import Conversation, Message, NothingToLearn
from lightning_lora.data.templates import check_options, set_template
from lightning_lora.ops.cross_entropy import IGNORE

TrainOn = Literal["assistant", "last", "all"]
MARK = "qwzxqwzxq"  # stands in for an answer; templates of Mistral want ids of calls with nine characters
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys under which answers have it
QUESTION: Message = {"role": "user", "content": "a"}
CALL = {"id": MARK, "type": "function", "function": {"name": MARK, "arguments": {MARK: MARK}}}
TOOL = {"type": "function", "function": {"name": MARK, "description": "a", "parameters": {"type": "object", "properties": {}}}}


class Chat:
    """A tokenizer with its chat template. Without one it gets the plain one of `TEMPLATES`.

    Args:
        tokenizer: A Hugging Face tokenizer.
        options: Further variables of the template, such as ``enable_thinking``.

    Raises:
        ValueError: The tokenizer has neither template nor end token, or the template reads no such option.
    """

    def __init__(self, tokenizer: Any, options: dict[str, Any] | None = None) -> None:
        if not tokenizer.chat_template:
            set_template(tokenizer, "plain")
        self.tokenizer, self.options = tokenizer, options or {}
        check_options(tokenizer.chat_template, self.options)

    def prompt(self, messages: list[Message], tools: list[Any] | None = None) -> list[int]:
        """Return the tokens from which the model generates its answer.

        Raises:
            ValueError: The template refuses the messages, or leaves one out.
        """
        text = self._prompt(messages, tools)
        self._check_written(messages, tools)
        return self._ids(text)

    def examples(self, conversation: Conversation, train_on: TrainOn = "assistant") -> list[Example]:
        """Return the examples to learn a conversation from: one, or several if the template rewrites earlier answers.

        Args:
            conversation: The last message is the assistant's. A message with ``weight: 0`` is not learnt.
            train_on: Learn every assistant turn, the last one, or every token.

        Raises:
            ValueError: The template refuses the messages, leaves one out, changes an answer, does not write it after its generation
                prompt, or ends it with no token of its own.
        """
        messages, tools = conversation.messages, conversation.tools
        if tools and not self.writes_tools:
            raise ValueError("the tokenizer's chat template does not write the row's tools; choose another with data.template")
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1)]
        turns = [i for i in turns if i >= (conversation.given if train_on == "assistant" else len(messages) - 1)]
        if not turns:
            raise NothingToLearn("every answer has weight 0, or there is nothing to learn")
        if train_on == "all" and any("weight" in message for message in messages):
            raise ValueError("data.train_on=all learns every token, and a message has weight 0; use assistant or last")
        if turns[0] == 0:
            raise ValueError("the first message is the assistant's, an answer to nothing; put the user's before it, or give it weight 0")
        self._check_written(messages[: turns[-1]], tools)
        parts = [self._turn(messages[: i + 1], tools) for i in turns]
        found: list[Example] = []
        while parts:
            whole = "".join(parts[-1])
            shared = [part for part in parts if whole.startswith("".join(part))]
            parts = [part for part in parts if part not in shared]
            found.insert(0, self._example(whole, shared))
        if train_on == "all":
            found = [Example(example.ids, list(example.ids)) for example in found]
        return found

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer: of one in text, and of a call to a tool if the template ends it otherwise."""
        ids = [self._ids(end)[-1] for end in self._endings]
        return list(dict.fromkeys(ids))

    @cached_property
    def _endings(self) -> tuple[str, str]:
        """What the template writes at the end of an answer in text, and of a call to a tool."""
        _, there, tail = self._whole([QUESTION, {"role": "assistant", "content": MARK}]).rpartition(MARK)
        end = self._ending(tail) if there else ""
        if not end and there and len(self._ids(tail.strip())) == 1:
            end = tail.strip()
        if not end:
            raise ValueError(
                f"the tokenizer's chat template ends an answer with no token of its own (but {tail!r}), so that no answer would end; "
                "put the end token there, or choose another with data.template"
            )
        try:
            tail = self._whole([QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}], [TOOL]).rpartition(MARK)[2]
        except ValueError:
            return end, end  # this template knows no tools, or none of this form: rows that have them are told so
        return end, end if end in tail else self._ending(tail) or end

    def _ending(self, tail: str) -> str:
        """Return the first special token in what follows an answer, with those directly after it (Cohere's templates write two)."""
        specials = [self.tokenizer.convert_ids_to_tokens(i) for i in self._ids(tail) if i in self._special]
        end = specials[0] if specials else ""
        for token in specials[1:]:
            end += token if end + token in tail else ""
        return end

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template tells the model of tools."""
        return self._prompt([QUESTION], [TOOL]) != self._prompt([QUESTION], None)

    @cached_property
    def _special(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder
        return {i for i, token in added.items() if token.special} | set(self.tokenizer.all_special_ids)

    def _turn(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, str]:
        """Return the text before the last message, which is the assistant's, and its own up to its end."""
        *before, message = messages
        prompt = self._prompt(before, tools)
        # Some templates write the text before an answer otherwise once the answer is there (Mistral's leave out the system message). What
        # generation reads counts, and the answer is taken from after a shorter question.
        for shorter in (before, [QUESTION]):
            start = prompt if shorter is before else self._prompt(shorter, tools)
            whole = self._whole([*shorter, message], tools)
            if whole.startswith(start):
                break
        else:
            raise ValueError(
                "the tokenizer's chat template does not put the assistant's answer after its generation prompt "
                f"(which ends in {prompt[-40:]!r}); set data.chat_template_kwargs (as enable_thinking: false), or another data.template"
            )
        turn = whole[len(start) :]
        shown = _letters(turn)
        if _letters(message["content"]) not in shown:
            raise ValueError(
                f"the tokenizer's chat template changes the answer {message['content'][:40]!r} (as some cut out reasoning); "
                "it would be learned so"
            )
        for key in REASONING:
            if isinstance(message.get(key), str) and _letters(message[key]) not in shown:
                raise ValueError(f"the tokenizer's chat template does not write the answer's {key!r}; leave it out, or set data.template")
        for call in message.get("tool_calls", []):
            if call["function"]["name"] not in turn:
                raise ValueError(f"the tokenizer's chat template does not write the tool call {call['function']['name']!r:.60}")
        end = self._endings[bool(message.get("tool_calls"))]
        if end not in turn:
            raise ValueError(f"the tokenizer's chat template does not end the answer with {end} as others, but with {turn[-40:]!r}")
        return prompt, turn[: turn.rindex(end) + len(end)]

    def _check_written(self, messages: list[Message], tools: list[Any] | None) -> None:
        """Refuse messages of which the template writes nothing, as of a role that it does not know: the model would never see them.

        Each gets a text of its own, which has to be in the prompt of the last answer. Or in that of the next one: Mistral's template
        leaves the system message out behind the result of a tool.
        """
        marks = {i: f"{MARK}{i}{MARK}" for i, m in enumerate(messages) if m["role"] != "assistant" and m["content"].strip()}
        marked = [{**message, "content": marks.get(i, message["content"])} for i, message in enumerate(messages)]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        try:
            text = self._prompt(marked, tools)
            left = [i for i, mark in marks.items() if mark not in text]
            left = [i for i in left if marks[i] not in self._prompt(marked[: next((j for j in answers if j > i), len(marked))], tools)]
        except ValueError:
            return  # it takes the messages, but not with these texts
        if left:
            message = messages[left[0]]
            raise ValueError(
                f"the tokenizer's chat template leaves out or changes the message of {message['role']!r} ({message['content'][:40]!r}); "
                "remove it, give it a role that the template writes, or choose another with data.template"
            )

    def _example(self, whole: str, parts: list[tuple[str, str]]) -> Example:
        """Encode a text of which some parts are learnt: (the text before the part, the part)."""
        ids = self._ids(whole)
        spans = []
        for prompt, turn in parts:
            before = self._ids(prompt)
            after = ids if prompt + turn == whole else self._ids(prompt + turn)
            spans.append((len(before), len(after)))
            if ids[: len(before)] != before or ids[: len(after)] != after:  # a token spans prompt and answer: generation makes none such
                ids, spans = self._pieces(whole, parts)
                break
        labels = [IGNORE] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        return Example(ids, labels)

    def _pieces(self, whole: str, parts: list[tuple[str, str]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode every part for itself."""
        ids: list[int] = []
        spans, done = [], 0
        for prompt, turn in parts:
            ids += self._ids(whole[done : len(prompt)])
            start, done = len(ids), len(prompt) + len(turn)
            ids += self._ids(turn)
            spans.append((start, len(ids)))
        spelled = self.tokenizer.convert_ids_to_tokens
        if "".join(spelled(ids)) != "".join(spelled(self._ids(whole))):
            raise ValueError(
                f"the tokenizer writes prompt and answer otherwise apart than together (at {parts[-1][0][-20:]!r}); "
                "choose another chat template with data.template"
            )
        return ids, spans

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written the special tokens

    def _prompt(self, messages: list[Message], tools: list[Any] | None) -> str:
        return self._rendered(messages, tools, add_generation_prompt=True)

    def _whole(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        return self._rendered(messages, tools, add_generation_prompt=False)

    def _rendered(self, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool) -> str:
        shown = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                shown, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **self.options
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"the tokenizer's chat template refuses the messages ({roles}): {error}") from error


def _letters(text: str) -> str:
    return "".join(text.split())


def encode_prompt(tokenizer: Any, messages: list[Message], tools: list[Any] | None = None) -> list[int]:
    """Return the tokens from which the model generates its answer to ``messages``; see `Chat.prompt`."""
    return Chat(tokenizer).prompt(messages, tools)


def turn_ends(tokenizer: Any) -> list[int]:
    """Return the tokens with which a tokenizer's template ends an answer. A template that ends none can still be generated with, up to the
    length asked for.
    """
    if tokenizer.chat_template:
        with suppress(ValueError):
            return Chat(tokenizer).ends
    return []


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens at which generation stops: those of the model's generation config, the tokenizer's end token, and its template's.

    Many base models end a text with one token, and their chat template a turn with another.
    """
    own = model.generation_config.eos_token_id
    ids = own if isinstance(own, list) else [own]
    return sorted({i for i in (*ids, tokenizer.eos_token_id, *turn_ends(tokenizer)) if i is not None})
