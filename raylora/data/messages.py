"""Turns conversations of any dialect that users bring into messages of one form, for chat templates.

Sources of the dialects: OpenAI's chat completions and fine-tuning formats (role, content, tool_calls, weight), ShareGPT
as LLaMA-Factory and axolotl read it (from, value, function_call, observation, train), and the message keys of
transformers' chat templates (reasoning_content, tool_calls with arguments as a mapping).
"""

import json
import re
from collections.abc import Iterable
from typing import Any

Message = dict[str, Any]
"""One turn: `role`; `content`, text; and, where given, `reasoning_content`, `tool_calls`, `name` and other keys."""

ROLES = {
    **dict.fromkeys(("user", "human", "input"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard", "output"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "tool_response", "function", "function_response", "ipython"), "tool"),
    "system": "system",
    "developer": "developer",
}
"""Speaker, as data sets name it -> role in a chat template."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of the reasoning before an answer: of vLLM and Qwen, of OpenRouter, and of gpt-oss."""

MASKS = ("weight", "train", "training")
"""Keys that say if a turn is trained on: OpenAI's weight, 0 or 1, and axolotl's booleans."""

_THINK = re.compile(r"\s*<think>\n*(?P<reasoning>.*?)\n*</think>\n*(?P<content>.*)", re.DOTALL)


def to_messages(turns: Any) -> tuple[tuple[Message, ...], tuple[bool, ...]]:
    """Return the messages of a conversation, and for each one if it is trained on.

    Args:
        turns: list of messages in any dialect; a dict of lists, one list per key; or the JSON text of either.

    Returns:
        Messages, at least one; and booleans, True only for assistant messages that no mask excludes.

    Raises:
        ValueError: a turn breaks a rule; the message names the turn, counted from 1.
        TypeError: it is no list of messages.
    """
    turns = _parsed(turns, "a conversation")
    if isinstance(turns, dict):
        turns = _from_lists(turns)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise TypeError(f"must be a list of messages, found {turns!r:.60}")
    messages, trained = [], []
    for number, turn in enumerate(turns, 1):
        try:
            message = _to_message(without_nulls(turn))
            trained.append(message["role"] == "assistant" and _is_trained(turn))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"message {number}: {error}") from error
        messages.append(message)
    return tuple(messages), tuple(trained)


def to_tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """Return the tools of a row in the form of OpenAI's `tools`.

    Args:
        tools: list of tools or of bare functions, or its JSON text; None or empty for none.

    Raises:
        ValueError: a tool has no name, or the text is no JSON.
    """
    tools = _parsed(tools, "tools")
    found = []
    for number, tool in enumerate(without_nulls(tools or []), 1):
        tool = _parsed(tool, f"tool {number}")
        tool = tool if isinstance(tool, dict) and "function" in tool else {"type": "function", "function": tool}
        if not isinstance(tool["function"], dict) or "name" not in tool["function"]:
            raise ValueError(f"tool {number} of `tools` has no name: {tool!r:.60}")
        found.append(tool)
    return tuple(found)


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that are null, at any depth.

    Arrow gives every row of a column the keys of all rows, and fills them with nulls.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def strings(value: Any) -> Iterable[str]:
    """Yield every string in a message, a tool or a list of them: keys of mappings and values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def split_reasoning(message: Message) -> Message:
    """Move a leading `<think>` block from an assistant's content to `reasoning_content`."""
    found = _THINK.fullmatch(message["content"]) if message["role"] == "assistant" else None
    if found is None or "reasoning_content" in message:
        return message
    rest = {key: value for key, value in message.items() if key != "content"}
    reasoning = {"reasoning_content": found["reasoning"]} if found["reasoning"].strip() else {}
    return {**rest, "content": found["content"], **reasoning}


def _from_lists(turns: dict[str, Any]) -> list[Message]:
    """Return the turns of a conversation that is stored as one list per key, as old Arrow data sets have it."""
    lengths = {len(values) for values in turns.values() if isinstance(values, list)}
    if len(lengths) != 1 or not all(isinstance(values, list) for values in turns.values()):
        raise TypeError(f"must be a list of messages, or lists of equal length, found {turns!r:.60}")
    return [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]


def _to_message(turn: Message) -> Message:
    """Return a turn of any dialect as a message."""
    speaker = turn.get("role", turn.get("from"))
    if speaker is None:
        raise ValueError(f"has neither `role` nor `from`; its keys: {', '.join(turn)}")
    role = ROLES.get(speaker, speaker) if "role" in turn else ROLES.get(speaker)
    if role is None:
        raise ValueError(f"unknown speaker {speaker!r}; known: {', '.join(ROLES)}")
    content, parts_reasoning = _text(turn.get("content", turn.get("value", "")), role)
    reasoning = next((turn[key] for key in REASONING if turn.get(key)), "") or parts_reasoning
    calls = _calls(turn, speaker, content)
    if calls and speaker in ("function_call", "tool_call"):
        content = ""
    used = {"role", "from", "content", "value", "tool_calls", "function_call", *REASONING, *MASKS}
    return {
        "role": role,
        "content": content,
        **({"reasoning_content": reasoning} if reasoning else {}),
        **({"tool_calls": calls} if calls else {}),
        **{key: value for key, value in turn.items() if key not in used},
    }


def _text(content: Any, role: str) -> tuple[str, str]:
    """Return content as text, and the reasoning that its parts hold."""
    if isinstance(content, str):
        return content, ""
    if role == "tool" and isinstance(content, dict):
        return json.dumps(content, ensure_ascii=False), ""
    if not isinstance(content, list):
        raise TypeError(f"content must be text, found {content!r:.60}")
    texts, reasoning = [], []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if isinstance(part, str):
            texts.append(part)
        elif kind == "thinking":
            reasoning.append("".join(_part_texts(part["thinking"])))
        elif kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise TypeError(f"content has a part of type {kind}; only text can be trained on")
    return "".join(texts), "".join(reasoning)


def _part_texts(value: Any) -> list[str]:
    """Return the texts of a `thinking` part, which is text or a list of text parts."""
    return [value] if isinstance(value, str) else [part["text"] for part in value]


def _calls(turn: Message, speaker: str, content: str) -> list[dict[str, Any]]:
    """Return the tool calls of a turn, each with its arguments as a mapping."""
    calls = _parsed(turn.get("tool_calls", []), "tool_calls")
    if "function_call" in turn:
        calls = [*calls, turn["function_call"]]
    if speaker in ("function_call", "tool_call"):
        written = _json_or_none(content)
        written = written if isinstance(written, list) else [written]
        if all(isinstance(call, dict) and "name" in call for call in written):
            calls = written
    return [_call(call) for call in calls]


def _call(call: Any) -> dict[str, Any]:
    """Return one tool call in OpenAI's form."""
    call = _parsed(call, "tool call")
    call = call if "function" in call else {"function": call}
    function = _parsed(call["function"], "function")
    if "name" not in function:
        raise ValueError(f"a tool call has no name: {call!r:.60}")
    arguments = _parsed(function.get("arguments", function.get("parameters", {})), "arguments") or {}
    if not isinstance(arguments, dict):
        raise TypeError(f"arguments of the tool call {function['name']} must be a mapping, found {arguments!r:.60}")
    rest = {key: value for key, value in call.items() if key not in ("type", "function")}
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}, **rest}


def _is_trained(turn: Message) -> bool:
    """Return False if a mask of the turn excludes it from training."""
    for key in MASKS:
        value = turn.get(key)
        if value is not None and value not in (0, 1):
            raise ValueError(f"{key} must be 0, 1 or a boolean, found {value!r}")
        if value is not None and not value:
            return False
    return True


def _parsed(value: Any, what: str) -> Any:
    """Return a value; parse it if it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} must be JSON, found {value[:60]!r}") from error


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None
