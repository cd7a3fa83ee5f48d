"""Checks that a chat template writes all that a row says: nothing may be missing from what the model reads."""

import json
import re
from collections.abc import Iterator
from typing import Any

from raylora.data.chat_template import ChatTemplate
from raylora.data.messages import Message
from raylora.errors import DataError


def check_support(
    source: str, messages: list[Message], tools: list[dict[str, Any]] | None, template: ChatTemplate
) -> None:
    """Check that the template reads the tools and tool calls that a conversation has, and can write their keys."""
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    for name, value in (("tools", tools), ("tool_calls", calls)):
        if value and not template.names(name):
            raise DataError(
                f"{source} has `{name}`, which the chat template does not write; use a base whose template knows "
                "tools, or name such a template by data.chat_template"
            )
        if key := template.key_with_control_tokens(value):
            raise DataError(f"{source}: the key {key!r} of `{name}` has a control token in it")


def check_answer(message: Message, answer: str) -> None:
    """Check that the whole of an assistant's message is in the answer."""
    pieces = {"content": [message["content"]], "reasoning_content": [message.get("reasoning_content", "")]}
    pieces |= {f"tool call {number}": _of_call(call) for number, call in enumerate(message.get("tool_calls", []), 1)}
    pieces["name"] = [message.get("name", "")]
    if dropped := _dropped(pieces, answer):
        raise DataError(f"the chat template drops {dropped} of this answer, or a part of it")


def check_context(source: str, messages: dict[int, Message], tools: tuple[dict[str, Any], ...], text: str) -> None:
    """Check that the messages without loss and the tools are in the text of the conversation."""
    pieces: dict[str, list[Any]] = {}
    for number, message in messages.items():
        what = f"of message {number} (role {message['role']})"
        pieces[f"the content {what}"] = [message["content"]]
        pieces[f"the tool calls {what}"] = [leaf for call in message.get("tool_calls", []) for leaf in _of_call(call)]
        if message["role"] != "tool":  # a tool's name is that of its call
            pieces[f"the name {message.get('name')!r} {what}"] = [message.get("name", "")]
    for tool in tools:
        function = tool["function"]
        parameters = function.get("parameters", {})
        properties = parameters.get("properties")
        names = properties if isinstance(properties, dict) else parameters if "type" not in parameters else {}
        pieces[f"the tool {function['name']} of `tools`"] = [function["name"], function.get("description", ""), *names]
    if dropped := _dropped(pieces, text):
        raise DataError(f"{source}: the chat template drops {dropped}")


def _of_call(call: dict[str, Any]) -> list[Any]:
    """Return the name of a tool call, and the keys and single values of its arguments."""
    return [call["function"]["name"], *_leaves(call["function"]["arguments"])]


def _leaves(value: Any) -> Iterator[Any]:
    """Yield keys and single values of arguments."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _dropped(pieces: dict[str, list[Any]], text: str) -> str | None:
    """Return the name of the first piece that a template has not written; None if it has written all.

    A short piece may be within another one, and must then be there once more.

    Args:
        pieces: name -> texts, numbers, booleans or None.
        text: what the template has written.
    """
    written = _squeezed(text)
    plain = [_squeezed(_as_text(value)) for values in pieces.values() for value in values]
    for name, values in pieces.items():
        for value in values:
            needed = _squeezed(_as_text(value))
            times = sum(other.count(needed) for other in plain) if needed else 0
            if sum(written.count(form) for form in _forms(value)) < times:
                return name
    return None


def _as_text(value: Any) -> str:
    """Return a text as it is, and any other value as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _forms(value: Any) -> set[str]:
    """Return the forms in which templates write a value, as text or as JSON, without white space."""
    as_json = {json.dumps(value), json.dumps(value, ensure_ascii=False)}
    forms = {str(value), *({form[1:-1] for form in as_json} if isinstance(value, str) else as_json)}
    return {_squeezed(form) for form in forms}


def _squeezed(text: str) -> str:
    """Return text without white space, which templates trim and add."""
    return re.sub(r"\s", "", text)
