"""Takes answers apart into text and tool calls, without reasoning, by what the chat template writes.

The template is asked once how it writes reasoning and a tool call. So no table of models is needed, and answers of a
model are read by the same rules as those of the data.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from raylora.data.chat_template import TEMPLATE_ERRORS, USER, ChatTemplate, common_prefix

CONTENT, REASONING, NAME = "some-content", "some-reasoning", "some_name"
"""Parts of the answers that the template is asked for."""

KEYS, VALUES = ("first_key", "second_key"), ("first value", "second value")
"""Arguments of the tool call that the template is asked for."""

PYTHON_VALUES = {"True": True, "False": False, "None": None}
"""Values that Python spells in another way than JSON."""

_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer without reasoning and control tokens."""

    text: str
    """Content, and a line of JSON for each tool call."""

    calls: str
    """Tool calls as JSON text: a list of names and arguments, with sorted keys; empty if there are none."""


@dataclass(frozen=True)
class ToolCall:
    """A tool call in the text of an answer."""

    start: int
    end: int
    """Range in the text, in characters."""

    name: str
    arguments: Any

    def as_json(self) -> str:
        """Return name and arguments as JSON text with sorted keys."""
        return json.dumps({"name": self.name, "arguments": self.arguments}, sort_keys=True, ensure_ascii=False)


class AnswerParser:
    """Reads the answers of a model with one chat template."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._head = self._written().partition(CONTENT)[0].strip()
        """Text before the content of an answer, e.g. the channel of gpt-oss; mostly empty."""

        self._reasoning_start, self._reasoning_end = "<think>", "</think>"
        """Texts around reasoning: what the template writes, or those if it writes none."""

        opening, found, rest = self._written(reasoning_content=REASONING).partition(REASONING)
        if found:
            between = rest.partition(CONTENT)[0].strip()
            self._reasoning_start, self._reasoning_end = opening.strip(), between.removesuffix(self._head) or between
        arguments = dict(zip(KEYS, VALUES, strict=True))
        call = {"type": "function", "id": "a12345678", "function": {"name": NAME, "arguments": arguments}}
        self._read_calls = _call_reader(self._written(content="", tool_calls=[call]))

    def parse(self, answer: str) -> ParsedAnswer:
        """Take an answer apart.

        Args:
            answer: text of an assistant's turn after the generation prompt, with control tokens.
        """
        answer = self._without_reasoning(answer)
        calls = list(self._read_calls(answer))
        rest, end = "", 0
        for call in calls:
            rest, end = rest + answer[end : call.start], call.end
        content = self._template.without_control_tokens((rest + answer[end:]).strip().removeprefix(self._head)).strip()
        as_json = [call.as_json() for call in calls]
        text = "\n".join([*([content] if content else []), *as_json])
        return ParsedAnswer(text, f"[{', '.join(as_json)}]" if calls else "")

    def _written(self, **changes: Any) -> str:
        """Return how the template writes an answer; empty if it cannot."""
        answer = self._template.adapt({"role": "assistant", "content": CONTENT, **changes})
        try:
            asked = self._template.text([USER], add_generation_prompt=True, enable_thinking=True, thinking=True)
            whole = self._template.text([USER, answer], enable_thinking=True, thinking=True)
        except TEMPLATE_ERRORS:
            return ""
        return whole.removeprefix(asked)

    def _without_reasoning(self, answer: str) -> str:
        """Return what follows the reasoning; nothing if the answer was cut off within it."""
        if not answer.lstrip().startswith(self._reasoning_start):
            return answer
        before, found, rest = answer.partition(self._reasoning_end)
        return rest if found or self._reasoning_start else before


class AnswerReader:
    """Reads answers from token ids, of texts or of conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, is_chat: bool) -> None:
        """Set up for one tokenizer.

        Args:
            tokenizer: tokenizer of the model; it has a chat template if `is_chat`.
            is_chat: True if the answers are turns of a conversation.
        """
        self._tokenizer = tokenizer
        self._parser = AnswerParser(ChatTemplate(tokenizer)) if is_chat else None

    def text(self, token_ids: list[int]) -> str:
        """Return an answer as text, without reasoning and special tokens."""
        if self._parser is None:
            return self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return self._parser.parse(self._tokenizer.decode(token_ids)).text

    def calls(self, token_ids: list[int]) -> str:
        """Return the tool calls of an answer as of `ParsedAnswer`, and the answer as text if it has none."""
        if self._parser is None:
            return ""
        answer = self._parser.parse(self._tokenizer.decode(token_ids))
        return answer.calls or answer.text


def _call_reader(written: str) -> Callable[[str], Iterator[ToolCall]]:
    """Return a function that yields the tool calls of an answer.

    Args:
        written: how the template writes a call of `NAME` with `KEYS` and `VALUES`.
    """
    arguments = dict(zip(KEYS, VALUES, strict=True))
    objects = [found for found in json_objects(written) if arguments in (found[2], *found[2].values())]
    if objects:
        before, found, between = written[: objects[0][0]].rpartition(NAME)
        if not found:
            return partial(_calls_in_json, between.rstrip().rpartition("\n")[2])
        lead = before.rpartition("\n")[2][-20:]
        return partial(_calls_before_json, re.compile(rf"{re.escape(lead)}([\w.-]+){re.escape(between)}$"))
    patterns = _tagged_call(written)
    return partial(_calls_in_tags, *patterns) if patterns else lambda answer: iter(())


def _calls_in_json(lead: str, answer: str) -> Iterator[ToolCall]:
    """Yield calls whose name and arguments stand in one JSON object, after `lead` or at the start of the answer."""
    for start, end, value in json_objects(answer):
        before, arguments = answer[:start].rstrip(), value.get("arguments", value.get("parameters"))
        is_call = before.endswith(lead) if lead else not before
        if is_call and isinstance(value.get("name"), str) and isinstance(arguments, dict):
            yield ToolCall(start, end, value["name"], arguments)


def _calls_before_json(name: re.Pattern[str], answer: str) -> Iterator[ToolCall]:
    """Yield calls whose name stands before a JSON object of the arguments."""
    for start, end, value in json_objects(answer):
        if found := name.search(answer[:start]):
            yield ToolCall(found.start(), end, found[1], value)


def _tagged_call(written: str) -> tuple[re.Pattern[str], re.Pattern[str]] | None:
    """Return patterns of a call, and of one argument within it, for templates with a tag for each argument.

    Args:
        written: as for `_call_reader`.

    Returns:
        A pattern with the groups name and arguments, and one with the groups key and value; None if the template
        writes arguments in another way.
    """
    between = [NAME, KEYS[0], VALUES[0], KEYS[1], VALUES[1]]
    parts = re.fullmatch("(.*?)" + "(.+?)".join(between) + "(.*)", written, re.DOTALL)
    if parts is None:
        return None
    lead, to_key, to_value, to_next_key, _, tail = parts.groups()
    n_shared = common_prefix(to_key[::-1], to_next_key[::-1])
    _, tag, rest = to_key[len(to_key) - n_shared :].rpartition("<")
    opening = tag + rest
    closing = to_next_key.removesuffix(opening)
    if not tag or not closing.strip():
        return None
    argument = f"{re.escape(opening)}(.+?){re.escape(to_value)}(.*?){re.escape(closing)}"
    names = f"{re.escape(lead.splitlines()[-1])}([\\w.-]+){re.escape(to_key.removesuffix(opening))}"
    last = re.escape(tail.removeprefix(closing).partition("\n")[0])
    in_call = argument.replace("(", "(?:")
    return re.compile(f"{names}((?:{in_call})*)(?:{last})?", re.DOTALL), re.compile(argument, re.DOTALL)


def _calls_in_tags(call: re.Pattern[str], argument: re.Pattern[str], answer: str) -> Iterator[ToolCall]:
    """Yield calls with a tag for each argument."""
    for found in call.finditer(answer):
        arguments = {key: _value(text) for key, text in argument.findall(found[2])}
        yield ToolCall(found.start(), found.end(), found[1], arguments)


def _value(text: str) -> Any:
    """Return a value that a template wrote without its type: as JSON or Python spells it, else text."""
    if text in PYTHON_VALUES:
        return PYTHON_VALUES[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def json_objects(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield start, end and value of each JSON object in a text that is not within another."""
    end = 0
    while (start := text.find("{", end)) >= 0:
        try:
            value, end = _DECODER.raw_decode(text, start)
        except ValueError:
            end = start + 1
            continue
        yield start, end, value
