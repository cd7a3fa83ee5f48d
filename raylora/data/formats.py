"""Turns rows of any known dataset format into examples: texts, or conversations.

Source of the formats: TRL's "Dataset formats and types" (text, prompt/completion, messages, conversations), Stanford
Alpaca (instruction/input/output), and LLaMA-Factory's columns beside them (system, history, tools).
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from raylora.data.examples import Conversation, Example, TextExample
from raylora.data.files import OnBadRow, Row, Rows, bad_row_to
from raylora.data.messages import (
    ROLES,
    Message,
    is_empty_cell,
    parsed,
    read_notation,
    to_messages,
    to_tools,
    without_nulls,
)
from raylora.errors import DataError

COLUMNS = {
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""Dataset format -> columns that it needs, in the order in which `auto` tries them: rows of other formats may have a
`text` column too."""

OPTIONAL_COLUMNS = {
    "prompt-completion": ("references",),
    "messages": ("references",),
    "conversations": ("references",),
    "alpaca": ("references", "input", "history"),
    "text": (),
}
"""Dataset format -> columns that it uses where they are given."""

CONVERSATION_COLUMNS = ("tools", "functions", "system", "chat_template_kwargs")
"""Columns that rows which are conversations use beside these."""

FIRST_ROWS = 100
"""Rows from which `auto` tells the format."""

ANSWER_MARKERS = ("[/INST]", "<|im_start|>assistant\n", "<start_of_turn>model\n", "### Response:", "### Assistant:")
"""Text before an answer in `text` rows of common templates: Llama 2, ChatML, Gemma, Alpaca, Guanaco."""


def to_examples(rows: Rows, format: str, *, source: str, on_bad_row: OnBadRow = None) -> list[Example]:
    """Convert rows, all of one dataset format.

    Args:
        rows: rows as read, at least one.
        format: a key of `COLUMNS`.
        source: opens the error message.
        on_bad_row: takes the error of each row that cannot be used; None raises the first.

    Raises:
        DataError: no format fits, or a row lacks a column or holds another type (with the row's number).
    """
    convert = _CONVERTERS[format]
    examples = []
    for number, row in rows.items():
        where = f"{source}: row {number}"
        with bad_row_to(on_bad_row):
            row = {column: value for column, value in row.items() if not is_empty_cell(value)}
            missing = [column for column in COLUMNS[format] if row.get(column) is None]
            if missing:
                raise DataError(f"{where} has no {', '.join(missing)}; its columns: {', '.join(row)}")
            try:
                examples.append(convert(row, where))
            except (TypeError, KeyError, ValueError) as error:
                raise DataError(f"{where} is not of format {format}: {error}") from error
    return examples


def detect_format(rows: Rows, source: str) -> str:
    """Return the dataset format of the first rows.

    Args:
        rows: rows with the columns of the format, at least one. Those of no format are passed over.
        source: opens the error message.

    Raises:
        DataError: no format has these columns.
    """
    first_rows = list(rows.values())[:FIRST_ROWS]
    for row in first_rows:
        for format, columns in COLUMNS.items():
            if all(row.get(column) is not None for column in columns):
                return format
    known = "; ".join(f"{format}: {', '.join(columns)}" for format, columns in COLUMNS.items())
    raise DataError(
        f"{source}: no known dataset format has the columns {', '.join(first_rows[0])}; known are {known}; "
        "`data.columns: {prompt: question, completion: answer}` gives columns other names"
    )


def unused_columns(rows: Iterable[Row], format: str, columns: Mapping[str, str], *, conversations: bool) -> list[str]:
    """Return the columns of rows that their dataset format does not read, in the order in which they appear.

    Args:
        rows: rows as read, with the columns of the file.
        format: their dataset format.
        columns: column of the format -> column of the file, where they differ.
        conversations: True if the rows are conversations.
    """
    read = (*COLUMNS[format], *OPTIONAL_COLUMNS[format], *(CONVERSATION_COLUMNS if conversations else ()))
    used = {columns.get(column, column) for column in read}
    return list(dict.fromkeys(column for row in rows for column in row if column not in used))


def rename_columns(rows: Rows, columns: Mapping[str, str], source: str) -> Rows:
    """Return the rows with their columns named as the format names them.

    Args:
        rows: rows as read.
        columns: column of the format -> column of the file, where they differ.
        source: opens the error message.

    Raises:
        DataError: no row has a named column.
    """
    if not columns:
        return rows
    first_row = next(iter(rows.values()))
    missing = [name for name in columns.values() if not any(name in row for row in rows.values())]
    if missing and all(name in first_row for name in columns):
        return rows  # another part may have the format's own names
    if missing:
        raise DataError(f"{source}: data.columns names {', '.join(missing)}; the columns are {', '.join(first_row)}")
    ours = {theirs: ours for ours, theirs in columns.items()}
    return {
        number: {ours.get(name, name): value for name, value in row.items() if name in ours or name not in columns}
        for number, row in rows.items()
    }


def _from_text(row: Row, where: str) -> TextExample:
    """Convert a row of `text`. Split it after the last answer marker, so that generation has a prompt."""
    text = _text(row["text"], "text")
    ends = [text.rfind(marker) + len(marker) for marker in ANSWER_MARKERS if marker in text]
    cut = max(ends, default=0)
    answer = re.sub(r"(</s>|<\|im_end\|>|<end_of_turn>)\s*$", "", text[cut:])
    return TextExample(text[:cut], text[cut:], (answer.strip(),), trains_on_prompt=True, source=where)


def _from_prompt_completion(row: Row, where: str) -> Example:
    """Convert a row of `prompt` and `completion`, which are text or messages. Only the completion is trained on."""
    prompt, completion = _turns(row["prompt"]), _turns(row["completion"])
    if isinstance(prompt, list | dict) or isinstance(completion, list | dict):
        question = prompt if isinstance(prompt, list | dict) else [{"role": "user", "content": prompt}]
        answer = completion if isinstance(completion, list | dict) else [{"role": "assistant", "content": completion}]
        asked, _ = to_messages(question)
        answered, trained = to_messages(answer)
        return _conversation(row, asked + answered, (False,) * len(asked) + trained, where)
    completion = _text(completion, "completion")
    references = _references(row) or (completion,)
    return TextExample(_text(prompt, "prompt"), completion, references, trains_on_prompt=False, source=where)


def _from_messages(row: Row, where: str) -> Conversation:
    """Convert a conversation in the column `messages`."""
    return _conversation(row, *to_messages(row["messages"]), where)


def _from_conversations(row: Row, where: str) -> Conversation:
    """Convert a conversation in the column `conversations`, mostly in ShareGPT's keys."""
    return _conversation(row, *to_messages(row["conversations"]), where)


def _from_alpaca(row: Row, where: str) -> Conversation:
    """Convert a row of `instruction`, `input` and `output`, with `system` and `history` if given."""
    asked, given = _text(row["instruction"], "instruction"), _text(row.get("input") or "", "input")
    history = parsed(row.get("history"), "history") or []
    if not isinstance(history, list):
        raise TypeError(f"history must be a list of [question, answer], found {history!r:.60}")
    turns = [turn for pair in history for turn in _history(pair)]
    turns.append({"role": "user", "content": f"{asked}\n\n### Input:\n{given}" if given else asked})
    turns.append({"role": "assistant", "content": _text(row["output"], "output")})
    return _conversation(row, *to_messages(turns), where)


def _history(pair: Any) -> list[Message]:
    """Return the two messages of an earlier exchange, `[question, answer]`."""
    if not isinstance(pair, list) or len(pair) != 2:
        raise TypeError(f"history must be a list of [question, answer], found {pair!r:.60}")
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]


_CONVERTERS: dict[str, Callable[[Row, str], Example]] = {
    "text": _from_text,
    "prompt-completion": _from_prompt_completion,
    "messages": _from_messages,
    "conversations": _from_conversations,
    "alpaca": _from_alpaca,
}


def _conversation(row: Row, messages: tuple[Message, ...], trained: tuple[bool, ...], where: str) -> Conversation:
    """Return messages and what stands beside them in a row. Leave out what follows the last trained message."""
    system = row.get("system")
    if system:
        if messages[0]["role"] in ("system", "developer"):
            raise ValueError("has a `system` column and a system message; only one of them can be used")
        messages, trained = ({"role": "system", "content": _text(system, "system")}, *messages), (False, *trained)
    if not any(trained):
        raise ValueError("a conversation needs an assistant message to train on")
    end = len(trained) - trained[::-1].index(True)
    kwargs = without_nulls(parsed(row.get("chat_template_kwargs"), "chat_template_kwargs")) or {}
    if not isinstance(kwargs, dict):
        raise TypeError(f"chat_template_kwargs must be a mapping, found {kwargs!r:.60}")
    return Conversation(
        messages[:end],
        trained[:end],
        to_tools(row.get("tools") or row.get("functions")),
        _references(row),
        kwargs,
        where,
    )


def _references(row: Row) -> tuple[str, ...]:
    """Return the row's `references`, empty if it has none. A text is one reference, or a JSON list of them."""
    found = row.get("references") or []
    if isinstance(found, str):
        found = _json_list(found) or [found]
    if not isinstance(found, list):
        found = [found]
    if any(isinstance(reference, list | dict) for reference in found):
        raise TypeError(f"references must be texts, found {found!r:.60}")
    texts = tuple(str(reference) for reference in found if reference is not None)
    "".join(texts).encode()  # JSON can spell half of a character
    return texts


def _json_list(text: str) -> list[Any]:
    """Return a JSON list, with numbers as they are written; an empty one if the text is none."""
    try:
        found = json.loads(text, parse_float=str, parse_int=str, parse_constant=str)
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []


def _turns(value: Any) -> Any:
    """Return messages that a CSV column spells, in JSON or in Python's notation, and any other value unchanged."""
    if not isinstance(value, str) or not re.match(r"""\s*\[\s*\{\s*["']""", value):
        return value
    messages = read_notation(value)
    return messages if isinstance(messages, list) and all(map(_is_turn, messages)) else value


def _is_turn(value: Any) -> bool:
    """Return True for a message: a mapping with a speaker and with something said or called."""
    if not isinstance(value, dict):
        return False
    speaker = str(value.get("role", value.get("from"))).lower()
    return speaker in ROLES and bool(value.keys() & {"content", "value", "tool_calls", "function_call", "refusal"})


def _text(value: Any, column: str) -> str:
    """Return the value. Check that it is text."""
    if not isinstance(value, str):
        raise TypeError(f"{column} must be text, found {value!r:.60}")
    return value
