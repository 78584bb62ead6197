"""Read messages, calls of tools and tools as chat files have them: checked, and in one form for all templates."""

from __future__ import annotations

import difflib
import json
from typing import Any

from lightning_lora.data.records import Message

ROLES = ("user", "assistant", "system", "tool", "developer", "function")


def text_of(value: Any, name: str) -> str:
    """Return a text, also from a list of text parts, as multimodal chat files have them."""
    if isinstance(value, list) and value and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        kind = "parts other than text" if isinstance(value, list) else f"{value!r:.60}"
        raise ValueError(f"{name} must be text, got {kind}; write it as a JSON text")
    return value


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
    if close and not role.startswith(close[0]):  # "user_2" may be meant
        # Most templates write any role as it is: the model would learn a misspelt one.
        raise ValueError(f"the role {role!r} is none of {', '.join(ROLES)}; did you mean {close[0]!r}?")
    turn = {key: value for key, value in message.items() if value is not None}
    if calls := turn.pop("tool_calls", None):
        if not isinstance(calls, list):
            raise ValueError(f"'tool_calls' must be a list of objects, got {calls!r:.60}")
        turn = {"content": "", **turn, "tool_calls": [_call(call) for call in calls]}
    if "content" not in turn:
        raise ValueError(f"the message of {turn['role']!r} has no 'content' and no 'tool_calls'")
    turn["content"] = text_of(turn["content"], f"the content of {turn['role']!r}")
    return turn


def _call(call: Any) -> Any:
    """Give a call's arguments as an object. OpenAI's files have them as JSON text, which templates would quote a second time."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f'a tool call must be like {{"function": {{"name": "...", "arguments": {{}}}}}}, got {call!r:.80}')
    function = {"arguments": {}, **function}
    if isinstance(function["arguments"], str):
        function["arguments"] = parsed(function["arguments"], "a tool call's arguments")
    return {**call, "type": "function", "function": function} if "function" in call else {"type": "function", "function": function}


def parsed(text: str, name: str) -> Any:
    """Return what a JSON text says."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} are not JSON ({error.msg} at column {error.colno}): {text!r:.60}") from error


def tools_of(row: dict[str, Any]) -> list[Any] | None:
    """Return a row's tools; None without any."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = parsed(tools, "'tools'") if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("'tools' must be a list of objects, each a function's JSON schema")
    return tools or None


def check_prompt(messages: list[Message]) -> None:
    """Refuse messages without any text, which there is nothing to answer in."""
    if not any(message["content"].strip() for message in messages):
        raise ValueError("the prompt is empty; give the model something to answer")
