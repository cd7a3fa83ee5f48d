"""Takes answers apart into text and tool calls, without reasoning, by what the chat template writes.

The template is asked once how it writes reasoning and a tool call. So no table of models is needed, and answers of a
model are read by the same rules as those of the data.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from raylora.data.chat_template import TEMPLATE_ERRORS, USER, ChatTemplate
from raylora.data.tool_calls import ASKED_CALL, call_reader

CONTENT, REASONING = "some-content", "some-reasoning"
"""Parts of the answers that the template is asked for."""


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer without reasoning and control tokens."""

    text: str
    """Content, and a line of JSON for each tool call."""

    calls: str
    """Tool calls as JSON text: a list of names and arguments, with sorted keys; empty if there are none."""


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
        self._read_calls = call_reader(self._written(content="", tool_calls=[ASKED_CALL]))

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
