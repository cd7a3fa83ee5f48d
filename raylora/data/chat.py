"""Turns conversations into token ids and labels, turn by turn, as the model will be asked for each answer.

For a turn to train on, the prompt is the conversation before it with the template's generation prompt. The answer is
what the conversation up to and with that turn has beyond the prompt. Several turns share a sequence if the conversation
with the earlier one begins that with the later one. Otherwise each has a sequence of its own: Qwen3's template takes
reasoning out of earlier answers, and gpt-oss's ends them in another token.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from raylora.data.chat_template import TEMPLATE_ERRORS, USER, ChatTemplate, common_prefix
from raylora.data.formats import Conversation
from raylora.data.messages import Message
from raylora.errors import DataError, first_line


@dataclass
class ChatSequence:
    """Tokens of a conversation up to one of its answers."""

    token_ids: list[int]
    text: str
    """The tokens as text."""

    spans: list[tuple[int, int]]
    """[start, end) of each answer with loss, ascending."""

    answer: str
    """Last answer as text, with control tokens."""

    prompt_cut: str
    """End of the template's generation prompt that the last answer lacks, such as `<think>`; mostly empty."""

    closing_tokens: set[int] = field(default_factory=set)
    """Tokens that end the answers."""


def encode_chat(
    conversation: Conversation, template: ChatTemplate, template_kwargs: Mapping[str, Any]
) -> list[ChatSequence]:
    """Tokenise a conversation.

    Args:
        conversation: row of the data.
        template: chat template.
        template_kwargs: variables of the template for all rows.

    Returns:
        Sequences in the order of the turns, at least one. Each ends in an answer.

    Raises:
        DataError: the template refuses the conversation, drops a part of it, or does not end an answer. The message
            names the row and the turn.
    """
    _check_support(conversation, template)
    kwargs = {**template_kwargs, **conversation.template_kwargs}
    messages = [template.adapt(message) for message in conversation.messages]
    tools = list(conversation.tools) or None
    sequences: list[ChatSequence] = []
    for index, is_trained in enumerate(conversation.trained):
        if not is_trained:
            continue
        try:
            options = {"tools": tools, **_thinking(messages[index]), **kwargs}
            following = messages[index + 1] if index + 1 < len(messages) else _following(messages[index])
            turn = _encode_turn(messages[: index + 1], following, template, options)
        except DataError as error:
            raise DataError(f"{conversation.source}, message {index + 1}: {error}") from error
        except TEMPLATE_ERRORS as error:
            raise DataError(
                f"{conversation.source}: the chat template refuses the conversation up to message {index + 1} "
                f"({messages[index]['role']}): {first_line(error)}"
            ) from error
        if sequences and turn.token_ids[: len(sequences[-1].token_ids)] == sequences[-1].token_ids:
            before = sequences.pop()
            turn.spans = before.spans + turn.spans
            turn.closing_tokens |= before.closing_tokens
        sequences.append(turn)
    _check_context(conversation, sequences[-1].text)
    return sequences


def _thinking(message: Message) -> dict[str, bool]:
    """Return the variables that turn reasoning off for an answer without it.

    The empty `<think>` block that Qwen3's template writes then belongs to the prompt. `enable_thinking` is Qwen3's
    name, `thinking` that of DeepSeek V3.1 and Granite.
    """
    reasons = "reasoning_content" in message
    return {"enable_thinking": reasons, "thinking": reasons}


def _following(message: Message) -> Message:
    """Return a message that may follow an answer."""
    return {"role": "tool", "content": "a"} if "tool_calls" in message else USER


def _encode_turn(
    messages: list[Message], following: Message, template: ChatTemplate, options: dict[str, Any]
) -> ChatSequence:
    """Return the sequence that ends in the last of some messages, an answer.

    Args:
        messages: adapted messages up to and with the answer.
        following: message after the answer.
        template: chat template.
        options: tools and variables of the template.
    """
    whole_text = template.text(messages, **options)
    whole = template.token_ids(messages, whole_text, **options)
    asked = messages[:-1]
    if asked:
        prompt_text = template.text(asked, add_generation_prompt=True, **options)
        prompt = template.token_ids(asked, prompt_text, add_generation_prompt=True, **options)
    else:  # no template renders an empty conversation
        prompt_text = _opening(whole_text, template, options)
        prompt = template.tokenizer(prompt_text, add_special_tokens=False).input_ids
    same = common_prefix(prompt_text, whole_text)
    if asked and same < min(len(prompt_text), len(template.text(asked, **options).rstrip())):
        raise DataError("the chat template writes the messages before this answer in another way once it follows")
    answer = whole_text[same:]
    _check_answer(messages[-1], answer)
    start = common_prefix(prompt, whole)
    closing = template.end_of_answer(whole_text, whole[start:], [*messages, following], **options)
    if closing is None:
        raise DataError(
            f"the chat template ends this answer in {answer[-20:]!r} and in no control token, so that the model would "
            "never learn to stop; write {{ eos_token }} after the content in a template of your own"
        )
    if closing not in whole[start:]:
        whole = [*whole, closing]
    return ChatSequence(whole, whole_text, [(start, len(whole))], answer, prompt_text[same:], {closing})


def _opening(whole: str, template: ChatTemplate, options: dict[str, Any]) -> str:
    """Return the prompt of an answer that opens the conversation: all up to the end of the generation prompt."""
    cue = template.generation_prompt(**options)
    while cue and cue not in whole:  # a generation prompt that opens a think block, which the answer lacks
        cue = cue[:-1]
    if not cue:
        raise DataError("the chat template opens no turn by its generation prompt, so an opening answer has no start")
    return whole[: whole.index(cue) + len(cue)]


# Nothing that a row says may be missing from what the model reads.


def _check_support(conversation: Conversation, template: ChatTemplate) -> None:
    """Check that the template reads the tools and tool calls that a conversation has."""
    calls = any("tool_calls" in message for message in conversation.messages)
    for key, is_used in (("tools", bool(conversation.tools)), ("tool_calls", calls)):
        if is_used and not template.names(key):
            raise DataError(
                f"{conversation.source} has `{key}`, which the chat template does not write; use a base whose template "
                "knows tools, or name such a template by data.chat_template"
            )


def _check_answer(message: Message, answer: str) -> None:
    """Check that the whole of an assistant's message is in the answer."""
    written = _squeezed(answer)
    for number, call in enumerate(message.get("tool_calls", []), 1):
        function = call["function"]
        if not all(_is_in(leaf, written) for leaf in (function["name"], *_leaves(function["arguments"]))):
            raise DataError(f"the chat template drops tool call {number}, {function['name']}, or a part of it")
    for key in ("content", "reasoning_content"):
        if not _is_in(message.get(key, ""), written):
            raise DataError(f"the chat template drops the {key} of this answer: {message[key].strip()[:60]!r}")


def _check_context(conversation: Conversation, text: str) -> None:
    """Check that the messages without loss and the tools are in the text of the conversation."""
    written = _squeezed(text)
    context = [
        (number, message)
        for number, (message, is_trained) in enumerate(zip(conversation.messages, conversation.trained, strict=True), 1)
        if not is_trained
    ]
    contents = [_squeezed(message["content"]) for _, message in context]
    for number, message in context:
        role, source = message["role"], conversation.source
        # a short content may be in another one too, and must then be there once more
        times = sum(other.count(_squeezed(message["content"])) for other in contents) if message["content"] else 0
        if not _is_in(message["content"], written, times):
            raise DataError(f"{source}, message {number}: the chat template drops the content of role {role}")
        if role != "tool" and not _is_in(message.get("name", ""), written):  # a tool's name is that of its call
            raise DataError(f"{source}, message {number}: the chat template drops the name {message['name']!r}")
    for tool in conversation.tools:
        function = tool["function"]
        parameters = (function.get("parameters") or {}).get("properties") or {}
        if not all(_is_in(text, written) for text in (function["name"], function.get("description", ""), *parameters)):
            raise DataError(f"{conversation.source}: the chat template drops the tool {function['name']} of `tools`")


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


def _is_in(value: Any, written: str, times: int = 1) -> bool:
    """Return True if a template wrote a value, as text or as JSON, at least so many times.

    Args:
        value: text, number, boolean or None.
        written: text without white space.
        times: 0 if the value is empty.
    """
    if value == "":
        return True
    as_json = {json.dumps(value), json.dumps(value, ensure_ascii=False)}
    forms = {str(value), *({form[1:-1] for form in as_json} if isinstance(value, str) else as_json)}
    return any(written.count(_squeezed(form)) >= times for form in forms)


def _squeezed(text: str) -> str:
    """Return text without white space, which templates trim and add."""
    return re.sub(r"\s", "", text)
