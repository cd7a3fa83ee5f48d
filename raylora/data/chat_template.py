"""Chooses the chat template of a search, and asks it what it writes: prompts, ends of turns, names of variables."""

import os
import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from transformers import GenerationConfig, PreTrainedTokenizerBase

from raylora.base.serving import adds_bos, end_tokens
from raylora.config.schema import DataSection
from raylora.data.messages import REASONING, ROLES, Message, split_reasoning, split_tool_calls, strings
from raylora.errors import DataError, first_line

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Jinja template of ChatML (github.com/openai/openai-python, chatml.md of release 0.28)."""

ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}"
    "{% if loop.first %}Below is an instruction that describes a task"
    "{% if '\n\n### Input:\n' in message['content'] %}, paired with an input that provides further context{% endif %}. "
    "Write a response that appropriately completes the request.\n\n"
    "{% elif loop.previtem['role'] == 'assistant' %}{{ '\n\n' }}{% endif %}"
    "### Instruction:\n{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'assistant' %}### Response:\n{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('the Alpaca template has no role ' + message['role']) }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)
"""Jinja template of Stanford Alpaca's two prompts (github.com/tatsu-lab/stanford_alpaca, README).

Ours are the end of a response by EOS, further exchanges after the first, and a system message in place of the opening.
"""

NAMED = {"chatml": CHATML, "alpaca": ALPACA}
"""Name in `data.chat_template` -> Jinja template."""

DATE = datetime(2026, 1, 1)
"""Date for templates that write today's, such as gpt-oss's: the same rows give the same tokens on any day."""

_GENERATION_TAG = re.compile(r"{%-? *(end)?generation *-?%}")

_TODAY = re.compile(r"strftime_now\(([\"'])(.+?)\1\)")

USER: Message = {"role": "user", "content": "a"}
"""Message for asking a template what it writes."""

LAST_CHARACTERS = 40
"""Characters by which the end of an answer is found again in a longer conversation."""

TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)
"""Errors with which a template ends on messages that it was not written for."""


def set_chat_template(
    data: DataSection, format: str, tokenizer: PreTrainedTokenizerBase, *, has_conversations: bool
) -> None:
    """Give the tokenizer the chat template that `data.chat_template` names. Alpaca rows default to Alpaca's.

    Args:
        data: settings of the data.
        format: dataset format of the training rows.
        tokenizer: changed in place.
        has_conversations: True if rows are conversations, which need a template.

    Raises:
        DataError: the template file is missing or broken, or conversations have no template at all.
    """
    chosen = data.chat_template or ("alpaca" if format == "alpaca" else "tokenizer")
    if chosen in NAMED:
        tokenizer.chat_template = _fitted(NAMED[chosen], tokenizer)
    elif chosen != "tokenizer":
        tokenizer.chat_template = _from_file(Path(chosen).expanduser())
    if has_conversations and not tokenizer.chat_template:
        raise DataError(
            "conversations need a chat template, and the tokenizer has none; "
            "set data.chat_template to `chatml` or to a Jinja file"
        )


def _fitted(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a template with the control tokens that a tokenizer has: BOS if it writes one, EOS to end a turn."""
    if len(tokenizer("<|im_end|>", add_special_tokens=False).input_ids) > 1:
        template = template.replace("<|im_end|>", "{{ eos_token }}")  # several tokens would stop no generation
    return "{{ bos_token }}" + template if adds_bos(tokenizer) else template


def _from_file(path: Path) -> str:
    """Read a Jinja file."""
    if not os.path.isfile(path):  # unlike `Path.is_file`, this takes names of more characters than a file can have
        names = ", ".join(f"`{name}`" for name in (*NAMED, "tokenizer"))
        raise DataError(f"data.chat_template must be {names} or a Jinja file, found {str(path)[:60]}")
    try:
        text = path.read_text(encoding="utf-8")
        # `generation` is a tag of transformers' own
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION_TAG.sub("", text))
    except (jinja2.TemplateError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no Jinja template: {first_line(error)}") from error
    return text


class ChatTemplate:
    """Chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        templates = tokenizer.chat_template
        self._sources = list(templates.values()) if isinstance(templates, dict) else [templates]
        self._knows_reasoning = any(self.names(key) for key in REASONING)
        control = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")

    def names(self, word: str) -> bool:
        """Return True if the template's text contains a word, such as the key of a message."""
        return any(re.search(rf"\b{re.escape(word)}\b", source) for source in self._sources)

    def adapt(self, message: Message) -> Message:
        """Return a message in the form that this template reads.

        Reasoning and tool calls are moved out of tags in content, since content is written as plain text. A `developer`
        is a `system`, OpenAI's older name, in a template that does not know the newer one.

        Raises:
            DataError: the template does not know the role, or would cut the content at a `</think>` in it.
        """
        message = split_reasoning(message) if self._knows_reasoning else message
        message = split_tool_calls(message) if self.names("tool_calls") else message
        if message["role"] == "developer" and not self.names("developer"):
            message = {**message, "role": "system"}
        if message["role"] not in ROLES.values() and not self.names(message["role"]):
            raise DataError(f"the chat template has no role {message['role']}")
        if self._knows_reasoning and message["role"] == "assistant" and "</think>" in message["content"]:
            raise DataError("the content has a </think> within it, where the chat template would cut it")
        return message

    def text(self, messages: list[Message], **options: Any) -> str:
        """Return messages as text.

        Args:
            messages: adapted messages, at least one.
            options: `tools`, `add_generation_prompt` and variables of the template.
        """
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **self._with_source(options))

    def token_ids(self, messages: list[Message], text: str, **options: Any) -> list[int]:
        """Return messages as token ids. Control tokens in content, such as `<|im_end|>`, are plain text.

        Args:
            messages: as for `text`.
            text: the messages as text.
            options: as for `text`.
        """
        if not self.has_control_tokens((messages, options.get("tools"))):
            return self.tokenizer(text, add_special_tokens=False).input_ids
        return self.tokenizer.apply_chat_template(messages, sanitize_control_tokens=True, **self._with_source(options))[
            "input_ids"
        ]

    def _with_source(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return options with the template's text, which has a fixed date in place of today's."""
        source = self.tokenizer.get_chat_template(tools=options.get("tools"))
        return {**options, "chat_template": _TODAY.sub(lambda found: repr(DATE.strftime(found[2])), source)}

    def key_with_control_tokens(self, value: Any) -> str | None:
        """Return a key within arguments or tools that contains a control token, which could not be written as text."""
        if isinstance(value, dict):
            own = next((key for key in value if self._control.search(key)), None)
            return own or self.key_with_control_tokens(list(value.values()))
        if isinstance(value, list | tuple):
            return next((key for item in value if (key := self.key_with_control_tokens(item))), None)
        return None

    def has_control_tokens(self, value: Any) -> bool:
        """Return True if a string within messages or tools contains one of the tokenizer's added tokens."""
        return any(self._control.search(text) for text in strings(value))

    def without_control_tokens(self, text: str) -> str:
        """Return text without the tokenizer's added tokens."""
        return self._control.sub("", text)

    def generation_prompt(self, **options: Any) -> str:
        """Return the text that opens an assistant's turn."""
        asked = self.text([USER], **options)
        return self.text([USER], add_generation_prompt=True, **options).removeprefix(asked)

    def end_of_answer(self, text: str, answer: list[int], messages: list[Message], **options: Any) -> int | None:
        """Return the control token that ends an answer; None if nothing but text does.

        In most templates it is the answer's last token, white space aside. In GLM's it opens the next turn. A token
        that the tokenizer does not call special, such as `</tool_call>`, ends a part of an answer only.

        Args:
            text: the answer as text.
            answer: the answer as token ids.
            messages: messages up to and with the answer, and one more.
            options: as for `text`.
        """
        added = self.tokenizer.added_tokens_decoder
        last = next((token for token in reversed(answer) if self.tokenizer.decode([token]).strip()), None)
        if last in added and added[last].special:
            return last
        end = text.rstrip()[-LAST_CHARACTERS:]
        _, found, rest = self.text(messages, **options).rpartition(end)
        following = self.tokenizer(rest.lstrip(), add_special_tokens=False).input_ids[:1] if end and found else []
        if following and following[0] in added and added[following[0]].special:
            return following[0]
        return last if last in added else None


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None) -> list[int]:
    """Return the tokens at which generation stops, ascending.

    They are EOS, the end tokens of the base's generation settings, and the token that ends an assistant's turn in the
    chat template.

    Args:
        tokenizer: maybe with a chat template.
        generation_config: generation settings of the base.
    """
    ends: set[int | None] = {tokenizer.eos_token_id, *(end_tokens(generation_config) if generation_config else ())}
    if tokenizer.chat_template:
        template = ChatTemplate(tokenizer)
        turns = [USER, {"role": "assistant", "content": "b"}]
        # a template may demand a system message or a variable; rows then show what ends their answers
        with suppress(*TEMPLATE_ERRORS):
            text, asked = template.text(turns), template.text([USER], add_generation_prompt=True)
            answer = text[common_prefix(asked, text) :]
            ids = tokenizer(answer, add_special_tokens=False).input_ids
            ends.add(template.end_of_answer(answer, ids, [*turns, USER]))
    return sorted(token for token in ends if token is not None)


def common_prefix(one: Any, other: Any) -> int:
    """Return the number of leading items that two texts or lists of token ids share."""
    if other[: len(one)] == one:
        return len(one)
    differing = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, len(other))
