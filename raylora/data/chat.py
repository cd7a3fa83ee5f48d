"""Renders conversations with the tokenizer's chat template and finds each assistant turn in the tokens."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from raylora.config.schema import DataSection
from raylora.data.formats import Example, Message
from raylora.errors import DataError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Jinja template of ChatML (github.com/openai/openai-python, chatml.md of release 0.28)."""


def set_chat_template(example: Example, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer the chat template that `data.chat_template` names.

    Args:
        example: any row of the data. It says if the rows are conversations, which need a template.
        data: settings of the data.
        tokenizer: changed in place.

    Raises:
        DataError: the template file is missing, or conversations have no template at all.
    """
    if data.chat_template is not None:
        path = Path(data.chat_template)
        if data.chat_template != "chatml" and not path.is_file():
            raise DataError(f"data.chat_template must be `chatml` or a Jinja file, found {data.chat_template}")
        tokenizer.chat_template = CHATML if data.chat_template == "chatml" else path.read_text(encoding="utf-8")
    if not isinstance(example.prompt, str) and not tokenizer.chat_template:
        raise DataError(
            "conversations need a chat template, and the tokenizer has none; "
            "set data.chat_template to `chatml` or to a Jinja file"
        )


def encode_chat(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Tokenise a conversation.

    Args:
        messages: the whole conversation, with at least one assistant message.
        tokenizer: has a chat template.

    Returns:
        Token ids of the prompt of the last assistant turn, token ids of the whole conversation, and the [start, end)
        span of each assistant turn. A span is found by rendering the conversation up to the turn and past it.
    """
    ids = _render(tokenizer, messages)
    spans, prompt_ids = [], []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt_ids = _render(tokenizer, messages[:index], add_generation_prompt=True)
            past = ids if index == len(messages) - 1 else _render(tokenizer, messages[: index + 1])
            spans.append((common_prefix(prompt_ids, ids), common_prefix(past, ids)))
    return prompt_ids, ids, spans


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: bool) -> list[int]:
    """Return the token ids of messages in the chat template."""
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of leading tokens that two sequences share."""
    differing = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))
