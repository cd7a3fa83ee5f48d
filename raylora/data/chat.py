"""Turns conversations into token ids and labels, turn by turn, as the model will be asked for each answer.

For a turn to train on, the prompt is the conversation before it with the template's generation prompt. The answer is
what the conversation up to and with that turn has beyond the prompt. Several turns share a sequence if the conversation
with the earlier one begins that with the later one. Otherwise each has a sequence of its own: Qwen3's template takes
reasoning out of earlier answers, and gpt-oss's ends them in another token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raylora.data.chat_checks import check_answer, check_context, check_support
from raylora.data.chat_template import TEMPLATE_ERRORS, USER, ChatTemplate, common_prefix
from raylora.data.examples import Conversation
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

    message: int
    """Index of the message that is the last answer."""

    start: int
    """First token of the last answer."""

    answer: str
    """Last answer as text, with control tokens."""

    prompt_cut: str
    """End of the template's generation prompt that the last answer lacks, such as `<think>`; mostly empty."""

    closing_tokens: set[int] = field(default_factory=set)
    """Tokens that end the answers."""


def encode_chat(
    conversation: Conversation,
    template: ChatTemplate,
    template_kwargs: Mapping[str, Any],
    *,
    one_answer_each: bool = False,
) -> list[ChatSequence]:
    """Tokenise a conversation.

    Args:
        conversation: row of the data.
        template: chat template.
        template_kwargs: variables of the template for all rows.
        one_answer_each: give each answer a sequence of its own.

    Returns:
        Sequences in the order of the turns, at least one. Each ends in an answer.

    Raises:
        DataError: the template refuses the conversation, drops a part of it, or does not end an answer. The message
            names the row and the turn.
    """
    kwargs = {**template_kwargs, **conversation.template_kwargs}
    messages = _adapted(conversation, template)
    tools = list(conversation.tools) or None
    check_support(conversation.source, messages, tools, template)
    sequences: list[ChatSequence] = []
    for index, is_trained in enumerate(conversation.trained):
        if not is_trained:
            continue
        options = {"tools": tools, **_thinking(messages[index]), **kwargs}
        following = messages[index + 1] if index + 1 < len(messages) else _following(messages[index])
        try:
            turn = _encode_turn(messages[: index + 1], following, template, options)
        except DataError as error:
            raise DataError(f"{conversation.source}, message {index + 1}: {error}") from error
        except TEMPLATE_ERRORS as error:
            raise DataError(
                f"{conversation.source}: the chat template refuses the conversation up to message {index + 1} "
                f"({messages[index]['role']}): {first_line(error)}"
            ) from error
        before = None if one_answer_each or not sequences else sequences[-1]
        if before and turn.token_ids[: len(before.token_ids)] == before.token_ids:
            sequences.pop()
            turn.spans = before.spans + turn.spans
            turn.closing_tokens |= before.closing_tokens
        sequences.append(turn)
    context = {number: message for number, message in enumerate(messages, 1) if not conversation.trained[number - 1]}
    check_context(conversation.source, context, conversation.tools, sequences[-1].text)
    return sequences


def _adapted(conversation: Conversation, template: ChatTemplate) -> list[Message]:
    """Return the messages in the form that the template reads."""
    messages = []
    for number, message in enumerate(conversation.messages, 1):
        try:
            messages.append(template.adapt(message))
        except (DataError, TypeError, ValueError) as error:  # the latter two of a spelt tool call
            raise DataError(f"{conversation.source}, message {number}: {error}") from error
    return messages


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
    same = _whole_tags(prompt_text, common_prefix(prompt_text, whole_text))
    asked_text = template.text(asked, **options).rstrip() if asked else ""
    if same < min(len(prompt_text), len(asked_text)):
        # the template writes earlier messages in another way once this answer follows, e.g. without their reasoning
        answer_ids, answer = _alone(messages[-1], template, options)
        if not whole_text.endswith(answer):
            raise DataError(
                "the chat template writes the messages before this answer in another way once it follows; give the "
                "turns as rows of their own, or name another template by data.chat_template"
            )
        whole, whole_text, same = prompt + answer_ids, prompt_text + answer, len(prompt_text)
    answer, start = whole_text[same:], common_prefix(prompt, whole)
    if same == len(prompt_text) and start < len(prompt):  # a token across the border, such as of two line breaks
        if template.has_control_tokens(messages[-1]):
            raise DataError("the answer joins with the generation prompt and holds control tokens; strip white space")
        whole, start = _parted(prompt, answer, whole, template), len(prompt)
    check_answer(messages[-1], answer)
    closing = template.end_of_answer(answer, whole[start:], [*messages, following], **options)
    if closing is None:
        raise DataError(
            f"the chat template ends this answer in {answer[-20:]!r} and in no control token, so that the model would "
            "never learn to stop; write {{ eos_token }} after the content in a template of your own"
        )
    if closing not in whole[start:]:
        whole = [*whole, closing]
    return ChatSequence(
        whole, whole_text, [(start, len(whole))], len(asked), start, answer, prompt_text[same:], {closing}
    )


def _opening(whole: str, template: ChatTemplate, options: dict[str, Any]) -> str:
    """Return the prompt of an answer that opens the conversation: all up to the end of the generation prompt."""
    cue = template.generation_prompt(**options)
    possible = [cue, cue.partition("<think")[0]]  # an answer may lack the think block that the cue opens
    cue = next((one for one in possible if one and one in whole), "")
    if not cue:
        raise DataError("the chat template cannot open a conversation with an answer")
    return whole[: whole.index(cue) + len(cue)]


def _whole_tags(prompt: str, end: int) -> int:
    """Return the length of a common prefix, cut back to before a tag of the prompt that it breaks."""
    start = prompt.rfind("<", 0, end)
    return start if end < len(prompt) and start >= 0 and ">" not in prompt[start:end] else end


def _alone(message: Message, template: ChatTemplate, options: dict[str, Any]) -> tuple[list[int], str]:
    """Return an answer as token ids and text, as the template writes it after a question."""
    prompt = template.text([USER], add_generation_prompt=True, **options)
    whole = template.text([USER, message], **options)
    answer = whole[common_prefix(prompt, whole) :]
    prompt_ids = template.token_ids([USER], prompt, add_generation_prompt=True, **options)
    ids = template.token_ids([USER, message], whole, **options)
    return ids[common_prefix(prompt_ids, ids) :], answer


def _parted(prompt: list[int], answer: str, whole: list[int], template: ChatTemplate) -> list[int]:
    """Return the tokens of prompt and answer, which the tokenizer would join at the border; generation cannot.

    Raises:
        DataError: the answer has other tokens by itself.
    """
    parted = prompt + template.tokenizer(answer, add_special_tokens=False).input_ids
    if template.tokenizer.decode(parted) != template.tokenizer.decode(whole):
        raise DataError("the answer's first characters join with the generation prompt to one token; strip white space")
    return parted
