"""Turns conversations of any dialect that users bring into messages of one form, for chat templates.

Sources of the dialects: OpenAI's chat completions and fine-tuning formats (role, content, tool_calls, weight), ShareGPT
as LLaMA-Factory and axolotl read it (from, value, function_call, observation, train), and the message keys of
transformers' chat templates (reasoning_content, tool_calls with arguments as a mapping).
"""

import ast
import json
import math
import re
from collections.abc import Iterable
from typing import Any

Message = dict[str, Any]
"""One turn: `role`; `content`, text; and, where given, `reasoning_content`, `tool_calls`, `name` and other keys."""

CALLERS = ("function_call", "tool_call")
"""Speakers whose turn is a tool call, spelt as JSON."""

ARGUMENTS = ("arguments", "parameters", "input", "args")
"""Keys of a tool call's arguments: of OpenAI, of Llama 3, of Anthropic, and of LangChain."""

ROLES = {
    **dict.fromkeys(("user", "human", "input"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard", "output"), "assistant"),
    **dict.fromkeys(CALLERS, "assistant"),
    **dict.fromkeys(("tool", "observation", "tool_response", "function", "function_response", "ipython"), "tool"),
    "system": "system",
    "developer": "developer",
}
"""Speaker, as data sets name it -> role in a chat template."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of the reasoning before an answer: of vLLM and Qwen, of OpenRouter, and of gpt-oss."""

MASKS = ("weight", "train", "training", "loss")
"""Keys that say if a turn is trained on: OpenAI's weight, 0 or 1, and the booleans of axolotl and ms-swift."""

NOT_TEXT = ("audio", "audios", "documents", "file", "files", "functions", "image", "images", "tools", "video", "videos")
"""Keys of a message that hold what a model would have to read besides its text."""

_THINK = re.compile(
    r"(?:\s*<think>\n*(?P<tagged>.*?)\n*</think>|(?P<opened>.*?)\n+</think>(?=\n))\n*(?P<content>.*)", re.DOTALL
)
"""Reasoning before an answer. Some data sets leave out the opening tag, which the generation prompt has written."""

_TOOL_CALLS = re.compile(r"(?P<content>.*?)(?P<calls>(?:<tool_call>.*?</tool_call>\s*)+)", re.DOTALL)
"""Content of a turn that spells its tool calls, as Hermes's data sets do."""

_TOOL_RESPONSE = re.compile(r"\s*<tool_response>\s*((?:(?!<tool_response>).)*?)\s*</tool_response>\s*", re.DOTALL)


def to_messages(turns: Any) -> tuple[tuple[Message, ...], tuple[bool, ...]]:
    """Return the messages of a conversation, and for each one if it is trained on.

    Args:
        turns: list of messages in any dialect; a dict of lists, one list per key; or the text of either, in JSON or in
            Python's notation, as pandas writes it to CSV.

    Returns:
        Messages, at least one; and booleans, True only for assistant messages that no mask excludes.

    Raises:
        ValueError: a turn breaks a rule; the message names the turn, counted from 1.
        TypeError: it is no list of messages.
    """
    turns = parsed(turns, "a conversation")
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
    tools = parsed(tools, "tools")
    found = []
    for number, tool in enumerate([tools] if isinstance(tools, dict) else tools or [], 1):
        tool = without_nulls(parsed(tool, f"tool {number}"))
        tool = tool if isinstance(tool, dict) and "function" in tool else {"type": "function", "function": tool}
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"tool {number} of `tools` has no name: {tool!r:.60}")
        schema = function.get("parameters", function.get("input_schema", {}))  # Anthropic's name
        parameters = parsed(schema, f"parameters of tool {function['name']}")
        if not isinstance(parameters, dict):
            raise TypeError(f"parameters of tool {function['name']} must be a mapping, found {parameters!r:.60}")
        function = {key: value for key, value in function.items() if key != "input_schema"}
        found.append({**tool, "function": {**function, **({"parameters": parameters} if parameters else {})}})
    return tuple(found)


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that are null, at any depth.

    Arrow gives every row of a column the keys of all rows, and fills them with nulls.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def is_empty_cell(value: Any) -> bool:
    """Return True for NaN, as which pandas writes an empty cell."""
    return isinstance(value, float) and math.isnan(value)


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
    reasoning = (found["tagged"] or found["opened"] or "").strip("\n")
    return {**message, "content": found["content"], **({"reasoning_content": reasoning} if reasoning.strip() else {})}


def split_tool_calls(message: Message) -> Message:
    """Move tool calls that an assistant's content spells in `<tool_call>` to `tool_calls`; unwrap a spelt response."""
    if message["role"] == "tool" and (response := _TOOL_RESPONSE.fullmatch(message["content"])):
        return {**message, "content": response[1]}
    found = _TOOL_CALLS.fullmatch(message["content"]) if message["role"] == "assistant" else None
    if found is None or "tool_calls" in message:
        return message
    calls = [read_notation(text) for text in re.findall("<tool_call>(.*?)</tool_call>", found["calls"], re.DOTALL)]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return message
    return {**message, "content": found["content"].strip(), "tool_calls": [_call(call) for call in calls]}


def _from_lists(turns: dict[str, Any]) -> list[Message]:
    """Return the turns of a conversation that is stored as one list per key, as old Arrow data sets have it."""
    turns = without_nulls(turns)
    lengths = {len(values) for values in turns.values() if isinstance(values, list)}
    if len(lengths) != 1 or not all(isinstance(values, list) for values in turns.values()):
        raise TypeError(f"must be a list of messages, or lists of equal length, found {turns!r:.60}")
    return [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]


def _to_message(turn: Message) -> Message:
    """Return a turn of any dialect as a message."""
    speaker = turn.get("role", turn.get("from"))
    if speaker is None:
        raise ValueError(f"has neither `role` nor `from`; its keys: {', '.join(turn)}")
    if not isinstance(speaker, str):
        raise TypeError(f"its role must be text, found {speaker!r:.60}")
    # a template may know further roles of its own, which is checked where the template is known
    role = ROLES.get(speaker.lower(), speaker if "role" in turn else "")
    if not role:
        raise ValueError(f"unknown speaker {speaker!r}; known: {', '.join(ROLES)}")
    if unread := [key for key in NOT_TEXT if turn.get(key)]:
        raise ValueError(f"has {', '.join(unread)}; only text can be trained on, and tools stand beside the messages")
    said = next((turn[key] for key in ("content", "value", "refusal") if key in turn), None)
    said = None if is_empty_cell(said) else said
    calls = _calls(turn)
    if speaker.lower() in CALLERS and not calls and (spelt := _spelt_calls(said)):
        calls, said = spelt, ""
    content, parts_reasoning = _text("" if said is None else said, role)
    reasoning = next((turn[key] for key in REASONING if turn.get(key)), "") or parts_reasoning
    if not isinstance(reasoning, str):
        raise TypeError(f"reasoning must be text, found {reasoning!r:.60}")
    reasoning = reasoning if reasoning.strip() else ""
    if said is None and not calls and not reasoning:
        raise ValueError(f"has no content; its keys: {', '.join(turn)}")
    used = {"role", "from", "content", "value", "refusal", "tool_calls", "function_call", *REASONING, *MASKS, *NOT_TEXT}
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
    if role != "tool" and isinstance(content, dict | list):  # a single part is one too
        content = [part for part in ([content] if isinstance(content, dict) else content) if part is not None]
    is_parts = isinstance(content, list) and all(map(_is_part, content))
    if role == "tool" and not is_parts:  # a result
        return json.dumps(content, ensure_ascii=False), ""
    if not is_parts:
        raise TypeError(f"content must be text or a list of parts, found {content!r:.60}")
    texts, reasoning = [], []
    for part in content:
        kind = "text" if isinstance(part, str) else part.get("type", "text")
        if isinstance(part, str):
            texts.append(part)
        elif kind == "thinking":
            reasoning.append("".join(_part_texts(part["thinking"])))
        elif kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise TypeError(f"content has a part of type {kind}; only text can be trained on")
    return "".join(texts), "".join(reasoning)


def _is_part(part: Any) -> bool:
    """Return True for a text, or a mapping that says what it is."""
    return isinstance(part, str) or (isinstance(part, dict) and bool(part.keys() & {"type", "text"}))


def _part_texts(value: Any) -> list[str]:
    """Return the texts of a `thinking` part, which is text or a list of text parts."""
    return [value] if isinstance(value, str) else [part["text"] for part in value]


def _calls(turn: Message) -> list[dict[str, Any]]:
    """Return the tool calls of a turn, each with its arguments as a mapping."""
    calls = parsed(turn.get("tool_calls"), "tool_calls") or []
    if turn.get("function_call"):
        calls = [*calls, turn["function_call"]]
    return [_call(call) for call in calls]


def _spelt_calls(content: Any) -> list[dict[str, Any]]:
    """Return the tool calls that are the content of a turn: one, a list, or one a line; empty if it is no call."""
    if isinstance(content, str):
        read = read_notation(content)
        content = [read_notation(line) for line in content.splitlines() if line.strip()] if read is None else read
    calls = content if isinstance(content, list) else [content]
    are_calls = all(isinstance(call, dict) and call.keys() & {"name", "function"} for call in calls)
    return [_call(call) for call in calls] if are_calls else []


def _call(call: Any) -> dict[str, Any]:
    """Return one tool call in OpenAI's form."""
    call = parsed(call, "tool call")
    if not isinstance(call, dict):
        raise TypeError(f"a tool call must be a mapping, found {call!r:.60}")
    call = call if "function" in call else {"function": call}
    function = parsed(call["function"], "function")
    if not isinstance(function, dict) or "name" not in function:
        raise ValueError(f"a tool call has no name: {call!r:.60}")
    key = next((key for key in ARGUMENTS if key in function), None)
    if key is None and (unread := [key for key in function if key not in ("name", "id", "type")]):
        raise ValueError(f"a tool call has {', '.join(unread)}, and no `arguments`")
    arguments = parsed(function.get(key, {}), "arguments") or {}
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


def parsed(value: Any, what: str) -> Any:
    """Return a value; parse it if it is text."""
    if not isinstance(value, str):
        return value
    found = read_notation(value)
    if found is None and value.strip() not in ("", "null", "None"):
        raise ValueError(f"{what} must be JSON, found {value[:60]!r}")
    return found


def read_notation(text: str) -> Any:
    """Return the value that a text spells in JSON, or a list or mapping in Python's notation; None if there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, list | dict) else None
