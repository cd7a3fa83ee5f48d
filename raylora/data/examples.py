"""Defines one row in the form that tokens are made of: a text, or a conversation."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raylora.data.messages import Message


@dataclass(frozen=True)
class TextExample:
    """One row whose tokens are those of its text."""

    prompt: str
    """Prompt that generation starts from; empty if the row has no question."""

    completion: str
    """Answer to the prompt."""

    references: tuple[str, ...]
    """Acceptable answers; the completion alone if the row has no `references`."""

    trains_on_prompt: bool
    """True if the loss covers the prompt too, as TRL does for `text`."""

    source: str = field(default="", compare=False, repr=False)
    """File or data set and number of the row, for messages."""

    def key(self) -> str:
        """Return a key that is equal for examples with the same prompt."""
        return repr(self.prompt or self.completion)

    def all_keys(self) -> set[str]:
        """Return the keys of all prompts that are trained on: the one."""
        return {self.key()}

    def has_answer(self) -> bool:
        """Return True if there is an answer to learn."""
        return bool(self.completion.strip())


@dataclass(frozen=True)
class Conversation:
    """One row whose tokens are those of its messages in a chat template."""

    messages: tuple[Message, ...]
    """Messages up to the last one that is trained on."""

    trained: tuple[bool, ...]
    """True for each message that is trained on; the last always is."""

    tools: tuple[dict[str, Any], ...] = ()
    """Tools that the model may call, in the form of OpenAI's `tools`."""

    references: tuple[str, ...] = ()
    """Acceptable last answers as text; empty to take the answer itself."""

    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template that the row sets."""

    source: str = field(default="", compare=False, repr=False)
    """File or data set and number of the row, for messages."""

    def key(self) -> str:
        """Return a key that is equal for conversations with the same tools and messages before the last answer."""
        return self._key(len(self.messages) - 1)

    def all_keys(self) -> set[str]:
        """Return the keys of all prompts that are trained on, one for each such answer."""
        return {self._key(index) for index, is_trained in enumerate(self.trained) if is_trained}

    def _key(self, index: int) -> str:
        """Return the key of the prompt before a message."""
        return repr((self.tools, self.messages[:index] or self.messages))

    def has_answer(self) -> bool:
        """Return True if the last answer has text or calls."""
        return bool(self.messages[-1]["content"].strip() or self.messages[-1].get("tool_calls"))


Example = TextExample | Conversation
"""One row, in the form that tokens are made of."""


def has_conversations(examples: Iterable[Example]) -> bool:
    """Return True if one of the examples is a conversation."""
    return any(isinstance(one, Conversation) for one in examples)
