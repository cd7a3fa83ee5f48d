"""Reads the tool calls in a model's answer, in the syntax in which its chat template has written one.

Templates write a call as JSON, with a tag for each argument, as a list of Python's calls, or in braces with bare keys.

`parse_response` of transformers is not used. Few tokenizers come with the `response_template` that it needs. With those
that TRL ships, it gives numbers in tags as text, and fails on a `None` as some of Gemma 4's templates write it.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from raylora.data.chat_template import common_prefix

NAME = "some_name"
"""Name in the tool call that the template is asked for."""

KEYS, VALUES = ("first_key", "second_key"), ("first value", "second value")
"""Arguments of the tool call that the template is asked for."""

ASKED_CALL = {
    "type": "function",
    "id": "a12345678",
    "function": {"name": NAME, "arguments": dict(zip(KEYS, VALUES, strict=True))},
}
"""The tool call that the template is asked for."""

PYTHON_VALUES = {"True": True, "False": False, "None": None}
"""Values that Python spells in another way than JSON."""

JSON_NAMES = {"true": True, "false": False, "null": None}
"""Values of JSON within Python's syntax, as LFM2's template writes nested ones."""

_DECODER = json.JSONDecoder()


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


def call_reader(written: str) -> Callable[[str], Iterator[ToolCall]]:
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
    if patterns := _tagged_call(written):
        return partial(_calls_in_tags, *patterns)
    if pattern := _python_call(written):
        return partial(_calls_in_python, pattern)
    if braced := _braced_call(written):
        return partial(_calls_in_braces, *braced)
    return lambda answer: iter(())


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
        written: as for `call_reader`.

    Returns:
        A pattern with the groups name and arguments, and one with the groups key and value; None if the template
        writes arguments in another way.
    """
    between = [NAME, KEYS[0], VALUES[0], KEYS[1], VALUES[1]]
    parts = re.fullmatch("(.*)" + "(.+?)".join(between) + "(.*)", written, re.DOTALL)
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


def _python_call(written: str) -> re.Pattern[str] | None:
    """Return a pattern whose group is a list of calls in Python's syntax, as LFM2's; None for another syntax.

    Args:
        written: as for `call_reader`.
    """
    call = rf"(.*)\[{NAME}\({KEYS[0]}=(.){VALUES[0]}\2, {KEYS[1]}=\2{VALUES[1]}\2\)\](.*)"
    parts = re.fullmatch(call, written, re.DOTALL)
    if parts is None:
        return None
    opening, closing = parts[1].rpartition("\n")[2], _first_token(parts[3])
    return re.compile(rf"{re.escape(opening)}(\[.*?\]){re.escape(closing) or '$'}", re.DOTALL)


def _calls_in_python(region: re.Pattern[str], answer: str) -> Iterator[ToolCall]:
    """Yield the calls of lists of calls in Python's syntax; a list that is not whole has none."""
    for found in region.finditer(answer):
        start = found.start()
        for name, arguments in _parsed_python(found[1].strip()):
            yield ToolCall(start, found.end(), name, arguments)
            start = found.end()


def _parsed_python(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return names and arguments of a list of calls; empty if it is anything else."""
    try:
        calls = ast.parse(text, mode="eval").body.elts  # type: ignore[attr-defined]
        return [
            (ast.unparse(call.func), {str(one.arg): ast.literal_eval(_as_python(one.value)) for one in call.keywords})
            for call in calls
            if not call.args
        ]
    except (SyntaxError, ValueError, TypeError, AttributeError, MemoryError, RecursionError):  # no list, or no calls
        return []


class _Names(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(JSON_NAMES[node.id]) if node.id in JSON_NAMES else node


def _as_python(value: ast.expr) -> ast.expr:
    """Return a value in which the names of JSON's constants are the constants."""
    changed = _Names().visit(value)
    assert isinstance(changed, ast.expr)
    return changed


def _braced_call(written: str) -> tuple[re.Pattern[str], str] | None:
    """Return a pattern with the groups name and arguments, and what stands around strings; None for another syntax.

    Keys are bare and strings have marks of their own, as in Gemma 4's calls.

    Args:
        written: as for `call_reader`.
    """
    call = rf"(.*){NAME}\{{{KEYS[0]}:(.+?){VALUES[0]}\2,{KEYS[1]}:\2{VALUES[1]}\2\}}(.*)"
    parts = re.fullmatch(call, written, re.DOTALL)
    if parts is None:
        return None
    opening, closing = parts[1].rpartition("\n")[2][-20:], _first_token(parts[3])
    return re.compile(rf"{re.escape(opening)}([\w.-]+)(\{{.*?\}}){re.escape(closing)}", re.DOTALL), parts[2]


def _calls_in_braces(call: re.Pattern[str], quote: str, answer: str) -> Iterator[ToolCall]:
    """Yield calls with bare keys, and strings between two `quote`."""
    for found in call.finditer(answer):
        parts = found[2].split(quote)  # what is outside of strings, and the strings, in turn
        for index, part in enumerate(parts):
            bare = re.sub(r"(?<=[{,])\s*([^\s{,:]+):", r'"\1":', part).replace("None", "null")
            parts[index] = json.dumps(part) if index % 2 else bare
        with suppress(json.JSONDecodeError):
            yield ToolCall(found.start(), found.end(), found[1], json.loads("".join(parts)))


def _first_token(text: str) -> str:
    """Return the control token at the start of a text; empty if it starts otherwise."""
    found = re.match(r"<[^<>]+>", text)
    return found[0] if found else ""


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
