"""Turns rows of any dataset format that TRL's SFT accepts into examples with a prompt and an answer.

Source of the formats: TRL's "Dataset formats and types" (text, prompt/completion, messages, conversations) and
Stanford Alpaca (instruction/input/output).
"""

import re
from dataclasses import dataclass
from typing import Any

from raylora.data.read import Row
from raylora.errors import DataError

Message = dict[str, str]
"""One turn of a conversation: `role` and `content`."""

COLUMNS = {
    "text": ("text",),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
}
"""Dataset format -> columns that it needs."""

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Speaker in ShareGPT's `from` -> role in a chat template."""

ALPACA_INTRO = "Below is an instruction that describes a task"
"""Opening of Stanford Alpaca's prompt (github.com/tatsu-lab/stanford_alpaca, README)."""

ANSWER_MARKERS = ("[/INST]", "<|im_start|>assistant\n", "<start_of_turn>model\n", "### Response:", "### Assistant:")
"""Text before an answer in `text` rows of common templates: Llama 2, ChatML, Gemma, Alpaca, Guanaco."""


@dataclass(frozen=True)
class Example:
    """One row, in the same form for every dataset format."""

    prompt: str | tuple[Message, ...]
    """Prompt that generation starts from: text, or messages for a chat template; empty if the row has no question."""

    completion: str | tuple[Message, ...]
    """Answer to the prompt: text or messages, as `prompt`."""

    references: tuple[str, ...]
    """Acceptable answers as text; the completion alone if the row has no `references`."""

    trains_on_prompt: bool
    """True if the loss covers the prompt too, as TRL does for `text`."""

    def key(self) -> str:
        """Return a key that is equal for examples with the same prompt."""
        return repr(self.prompt or self.completion)


def to_examples(rows: list[Row], format: str, *, source: str) -> list[Example]:
    """Convert rows, all of one dataset format.

    Args:
        rows: rows as read, at least one.
        format: a key of `COLUMNS`, or `auto` to tell the format from the columns of the first row.
        source: opens the error message.

    Raises:
        DataError: no format fits, or a row lacks a column or holds another type (with the row's number).
    """
    format = _detect(rows[0], source) if format == "auto" else format
    convert = _CONVERTERS[format]
    examples = []
    for number, row in enumerate(rows, 1):
        missing = [column for column in COLUMNS[format] if row.get(column) is None]
        if missing:
            raise DataError(f"{source}: row {number} has no {', '.join(missing)}; its columns: {', '.join(row)}")
        try:
            examples.append(convert(row))
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(f"{source}: row {number} is not of format {format}: {error}") from error
    return examples


def _detect(row: Row, source: str) -> str:
    """Return the dataset format of a row. `text` comes last: rows of other formats may have a `text` column too."""
    for format in ("prompt-completion", "messages", "conversations", "alpaca", "text"):
        if all(column in row for column in COLUMNS[format]):
            return format
    known = "; ".join(f"{format}: {', '.join(columns)}" for format, columns in COLUMNS.items())
    raise DataError(f"{source}: no known dataset format has the columns {', '.join(row)}; known are {known}")


def _from_text(row: Row) -> Example:
    """Convert a row of `text`. Split it after the last answer marker, so that generation has a prompt."""
    text = _text(row["text"], "text")
    ends = [text.rfind(marker) + len(marker) for marker in ANSWER_MARKERS if marker in text]
    cut = max(ends, default=0)
    answer = re.sub(r"(</s>|<\|im_end\|>|<end_of_turn>)\s*$", "", text[cut:])
    return Example(text[:cut], text[cut:], (answer.strip(),), trains_on_prompt=True)


def _from_prompt_completion(row: Row) -> Example:
    """Convert a row of `prompt` and `completion`, which are text or messages."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):
        messages = _messages(prompt)
        answer = _messages(completion) if isinstance(completion, list) else (_message("assistant", completion),)
        return Example(messages, answer, _references(row, answer[-1]["content"]), trains_on_prompt=False)
    completion = _text(completion, "completion")
    return Example(_text(prompt, "prompt"), completion, _references(row, completion), trains_on_prompt=False)


def _from_messages(row: Row) -> Example:
    """Convert a conversation. The completion is its last assistant message."""
    messages = _messages(row["messages"])
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("a conversation needs an assistant message")
    last = answers[-1]
    answer = messages[last]["content"]
    return Example(messages[:last], messages[last : last + 1], _references(row, answer), trains_on_prompt=False)


def _from_conversations(row: Row) -> Example:
    """Convert a conversation in ShareGPT's columns, `from` and `value`."""
    messages = []
    for turn in row["conversations"]:
        role = turn.get("from") or turn.get("role")
        if role not in SHAREGPT_ROLES:
            raise ValueError(f"unknown speaker {role!r}; known: {', '.join(SHAREGPT_ROLES)}")
        messages.append(_message(SHAREGPT_ROLES[role], turn.get("value") or turn.get("content")))
    return _from_messages({**row, "messages": messages})


def _from_alpaca(row: Row) -> Example:
    """Convert a row of `instruction`, `input` and `output` by Stanford Alpaca's prompt template."""
    instruction, given = _text(row["instruction"], "instruction"), row.get("input") or ""
    head, body = f"{ALPACA_INTRO}. ", f"### Instruction:\n{instruction}\n\n"
    if given:
        head, body = (
            f"{ALPACA_INTRO}, paired with an input that provides further context. ",
            body + f"### Input:\n{given}\n\n",
        )
    prompt = f"{head}Write a response that appropriately completes the request.\n\n{body}### Response:\n"
    answer = _text(row["output"], "output")
    return Example(prompt, answer, _references(row, answer), trains_on_prompt=False)


_CONVERTERS = {
    "text": _from_text,
    "prompt-completion": _from_prompt_completion,
    "messages": _from_messages,
    "conversations": _from_conversations,
    "alpaca": _from_alpaca,
}


def _references(row: Row, answer: str) -> tuple[str, ...]:
    """Return the row's `references`, or the answer alone."""
    return tuple(str(reference) for reference in row.get("references") or (answer,))


def _messages(messages: Any) -> tuple[Message, ...]:
    """Check a list of messages."""
    if not isinstance(messages, list) or not messages:
        raise TypeError(f"must be a list of messages, found {messages!r:.60}")
    return tuple(_message(message["role"], message["content"]) for message in messages)


def _message(role: str, content: Any) -> Message:
    """Return a message. Check that its content is text."""
    return {"role": role, "content": _text(content, "content")}


def _text(value: Any, column: str) -> str:
    """Return the value. Check that it is text."""
    if not isinstance(value, str):
        raise TypeError(f"{column} must be text, found {value!r:.60}")
    return value
