"""Turns of dialects that users bring: read, or refused by name, and never trained on as JSON."""

import json
from typing import Any

import pytest

from raylora.data.messages import Message, to_messages, to_tools

ASKED = {"role": "user", "content": "q"}
CALL = {"name": "f", "arguments": {"a": 0}}
OURS = {"type": "function", "function": CALL}


def answer(*turns: Message) -> Message:
    """The last message of a question and these turns."""
    return to_messages([ASKED, *turns])[0][-1]


@pytest.mark.parametrize(
    "spelt",
    [
        json.dumps(CALL),
        json.dumps({"type": "function", "function": CALL}),
        json.dumps({"type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}),
        str(CALL),  # as Python writes it
        json.dumps([CALL]),
        CALL,
    ],
)
@pytest.mark.parametrize("speaker", ["function_call", "Function_Call", "tool_call"])
def test_a_turn_that_is_a_call_is_read_as_one(speaker: str, spelt: Any) -> None:
    said = answer({"from": speaker, "value": spelt})
    assert said["tool_calls"] == [OURS] and said["content"] == ""


def test_several_calls_of_a_turn_stand_in_a_list_or_on_lines() -> None:
    for spelt in (json.dumps([CALL, CALL]), f"{json.dumps(CALL)}\n{json.dumps(CALL)}\n"):
        assert answer({"from": "function_call", "value": spelt})["tool_calls"] == [OURS, OURS]


@pytest.mark.parametrize("key", ["arguments", "parameters", "input", "args"])
def test_arguments_are_read_by_any_of_their_names(key: str) -> None:
    for call in ({"name": "f", key: {"a": 0}}, {"type": "function", "function": {"name": "f", key: '{"a": 0}'}}):
        assert answer({"role": "assistant", "content": None, "tool_calls": [call]})["tool_calls"] == [OURS]


def test_a_call_whose_arguments_have_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="message 2: a tool call has payload, and no `arguments`"):
        answer({"role": "assistant", "content": None, "tool_calls": [{"name": "f", "payload": {"a": 0}}]})
    bare = answer({"role": "assistant", "content": None, "tool_calls": [{"id": "1", "name": "f"}]})
    assert bare["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_nulls_in_a_tools_result_stay() -> None:
    said = to_messages([ASKED, {"role": "tool", "content": [None, 3]}])[0][-1]
    assert said["content"] == "[null, 3]"


@pytest.mark.parametrize("text", ["{}", "call f", '{"a": 0}', "[1]"])
def test_a_call_without_a_name_is_text(text: str) -> None:
    assert answer({"from": "function_call", "value": text}) == {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (
            {"role": "assistant", "content": [{"text": "Looking."}, {"toolUse": {"name": "f"}}]},
            r"message 2: content must be text or a list of parts, found \[\{'text'",
        ),
        ({"role": "assistant", "content": {"answer": 3}}, r"message 2: content must be text or a list of parts"),
        ({"role": "assistant", "content": 3}, r"message 2: content must be text or a list of parts, found 3"),
        (
            {"role": "assistant", "content": [{"type": "image", "url": "x"}]},
            "message 2: content has a part of type image; only text",
        ),
    ],
)
def test_an_answer_that_is_neither_text_nor_call_is_refused(turn: Message, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answer(turn)


def test_parts_are_text_also_a_single_one_and_beside_nulls() -> None:
    part = {"type": "text", "text": "a0"}
    for content in (part, [part], [part, None], ["a0"]):
        assert answer({"role": "assistant", "content": content})["content"] == "a0"


def test_an_empty_cell_of_pandas_is_no_content() -> None:
    said = answer({"role": "assistant", "content": float("nan"), "tool_calls": [OURS]})
    assert said == {"role": "assistant", "content": "", "tool_calls": [OURS]}
    with pytest.raises(ValueError, match="message 2: has no content"):
        answer({"role": "assistant", "content": float("nan")})


def test_blank_reasoning_is_none() -> None:
    assert "reasoning_content" not in answer({"role": "assistant", "content": "a", "reasoning_content": "\n"})


def test_conversations_tools_and_arguments_may_be_in_pythons_notation() -> None:
    turns = [ASKED, {"role": "assistant", "content": None, "tool_calls": [OURS]}]
    assert to_messages(str(turns)) == to_messages(turns)
    assert to_tools(str([{"name": "f"}])) == to_tools([{"name": "f"}])
    with pytest.raises(ValueError, match="a conversation must be JSON, found"):
        to_messages("__import__('os')")


def test_anthropics_schema_is_that_of_the_parameters() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    assert to_tools([{"name": "f", "input_schema": schema}]) == to_tools([{"name": "f", "parameters": schema}])
