"""Read messages, calls of tools and tools as chat files have them: checked, and in one form for all templates."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any

from lightning_lora.data.records import Message

ROLES = ("user", "assistant", "system", "tool", "developer", "function")
# Names that ShareGPT's data sets have for them.
SPEAKERS = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai", "bing", "bard"), "assistant")}
SPEAKERS |= {"observation": "tool", "function_response": "tool", "tool_response": "tool"}
# Flags of one message, 0 or 1, that tell whether it is learnt: OpenAI's, axolotl's and ms-swift's.
FLAGS = ("weight", "train", "loss")
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]""")  # a list of messages as text, as tables have it


def text_of(value: Any, name: str) -> str:
    """Return a text, also from a list of text parts, as multimodal chat files have them."""
    if isinstance(value, list) and value and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join([text_of(part.get("text"), f"the 'text' in {name}") for part in value])
    if not isinstance(value, str):
        if isinstance(value, list):
            raise ValueError(f"{name} must be text, got parts other than text; only texts are read, so leave the other parts out")
        raise ValueError(f"{name} must be text, got {value!r:.60}; write it as a JSON text")
    return value


def as_turns(value: Any, role: str, name: str) -> list[Message]:
    """Return the messages that a text, a list of messages, or such a list as text stands for."""
    if isinstance(value, list) or (isinstance(value, str) and _MESSAGES.match(value)):
        return turns_of(value, name)
    return [{"role": role, "content": text_of(value, name)}]


def turns_of(value: Any, name: str) -> list[Message]:
    """Return messages: from a list, or from its JSON text, as tables have it."""
    if isinstance(value, str):
        value = parsed(value, repr(name))
    if not isinstance(value, list) or not all(isinstance(m, dict) and "role" in m for m in value):
        raise ValueError(f'{name!r} must be a list of objects with \'role\' and \'content\': [{{"role": "user", "content": "..."}}, ...]')
    return [_turn(message) for message in value]


def _turn(message: Message) -> Message:
    if not isinstance(message["role"], str):
        raise ValueError(f"every 'role' must be text such as \"user\", got {message['role']!r:.60}")
    role, close = message["role"], difflib.get_close_matches(message["role"].lower(), ROLES, 1, 0.75)
    close = close or [SPEAKERS[each] for each in (role.lower(),) if each in SPEAKERS]
    if close and not role.startswith(close[0]):  # "user_2" may be meant
        # Most templates write any role as it is: the model would learn a misspelt one.
        raise ValueError(f"the role {role!r} is none of {', '.join(ROLES)}; did you mean {close[0]!r}?")
    turn = _weighed({key: value for key, value in message.items() if value is not None})
    if "function_call" in turn:
        raise ValueError("'function_call' is the older form of a call; write 'tool_calls', and the result as a message of 'tool'")
    if calls := turn.pop("tool_calls", None):
        if not isinstance(calls, list):
            raise ValueError(f"'tool_calls' must be a list of objects, got {calls!r:.60}")
        turn = {"content": "", **turn, "tool_calls": [_call(call) for call in calls]}
    if "content" not in turn:
        raise ValueError(f"the message of {turn['role']!r} has no 'content' and no 'tool_calls'")
    turn["content"] = text_of(turn["content"], f"the content of {turn['role']!r}")
    return turn


def _weighed(turn: Message) -> Message:
    """Give a message that is not to be learnt ``weight`` 0, whichever flag says so."""
    flags = {name: turn[name] for name in FLAGS if name in turn}
    for name, value in flags.items():
        if not isinstance(value, (int, float)) or value not in (0, 1):
            raise ValueError(f"{name!r} of a message must be 0 or 1 (it is learnt or it is not), got {value!r:.40}")
    turn = {key: value for key, value in turn.items() if key not in FLAGS}
    return turn if all(flags.values()) else {**turn, "weight": 0}


def _call(call: Any) -> Any:
    """Give a call's arguments as an object. OpenAI's files have them as JSON text, which templates would quote a second time."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f'a tool call must be like {{"function": {{"name": "...", "arguments": {{}}}}}}, got {call!r:.80}')
    given = function.get("arguments") or {}  # OpenAI's files may have "" or null for none
    if isinstance(given, str):
        given = parsed(given, "a tool call's arguments")
    if not isinstance(given, dict):
        raise ValueError(f"a tool call's arguments must be an object, name to value, got {given!r:.60}")
    function = {**function, "arguments": given}
    return {**call, "type": "function", "function": function} if "function" in call else {"type": "function", "function": function}


def parsed(text: str, name: str) -> Any:
    """Return what a JSON text says."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} are not JSON ({error.msg} at column {error.colno}): {text!r:.60}") from error
    check_characters(text, value)
    return value


def check_characters(text: str, value: Any) -> None:
    """Refuse a value parsed from JSON that has half a character, as of an emoji that was cut: no tokenizer takes it."""
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape").decode()
            raise ValueError(f"it has half a character ({half}), as of an emoji that was cut; remove it") from error


def tools_of(row: dict[str, Any]) -> list[Any] | None:
    """Return a row's tools; None without any."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = parsed(tools, "'tools'") if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("'tools' must be a list of objects, each a function's JSON schema")
    return tools or None


def begun_by_system(row: dict[str, Any], messages: list[Message]) -> list[Message]:
    """Return messages with the row's own system message before them, if there is one (`system_prompt` is OpenOrca's name)."""
    for name in ("system", "system_prompt"):
        if row.get(name):
            first = {"role": "system", "content": text_of(row[name], repr(name))}
            if messages[0]["role"] == "system" and messages[0]["content"] != first["content"]:
                raise ValueError(f"the row has {name!r}, and its messages begin with another system message; leave one out")
            messages = messages if messages[0]["role"] == "system" else [first, *messages]
    return messages


def check_text_only(row: dict[str, Any]) -> None:
    """Refuse what would be left out in silence: images and sounds, and functions in OpenAI's older form."""
    for name in ("images", "image", "videos", "video", "audios", "audio"):
        if row.get(name):
            raise ValueError(
                f"the row has {name!r}, and only texts are read; leave it out, or rename it with data.columns to train without"
            )
    if row.get("functions"):
        raise ValueError(
            "'functions' is the older form of 'tools'; write [{\"type\": \"function\", \"function\": {...}}, ...] under 'tools'"
        )


def check_prompt(messages: list[Message]) -> None:
    """Refuse messages without any text, which there is nothing to answer in."""
    if not any(message["content"].strip() for message in messages):
        raise ValueError("the prompt is empty; give the model something to answer")
