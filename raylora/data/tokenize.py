"""Turns examples into token ids and labels, as Arrow data sets that can be memory-mapped.

Tokens and labels of texts equal those of TRL's SFTTrainer; `tests/data/test_tokenize.py` compares them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from raylora.base.serving import adds_bos
from raylora.data.answers import AnswerParser
from raylora.data.chat import ChatSequence, encode_chat
from raylora.data.chat_template import ChatTemplate, common_prefix
from raylora.data.examples import Conversation, Example, TextExample
from raylora.data.files import OnBadRow, bad_row_to
from raylora.data.rows import IGNORE
from raylora.errors import DataError
from raylora.run.activity import track

READ_KEYS = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name"}
"""Keys of messages whose loss would be an error, and the id that ties a result to its call."""


@dataclass(frozen=True)
class PartSummary:
    """Size of one part, shown to the user before the search."""

    examples: int
    """Rows of the data."""

    conversations: int
    """Rows of the data that are conversations."""

    rows: int
    """Rows in the token cache; a conversation can make several."""

    tokens: int
    """Tokens after truncation."""

    trained_tokens: int
    """Tokens with loss."""

    length_p50: int
    """Median length in tokens before truncation."""

    length_p95: int
    """95th percentile of the length in tokens before truncation."""

    length_max: int
    """Longest row in tokens before truncation."""

    n_long: int
    """Rows over `max_length`, truncated or dropped."""

    n_cut_answers: int
    """Truncated rows that lost the end of an answer, or all of it; the latter are left out."""

    n_dropped: int
    """Rows left out: too long with `long_rows: drop`, or without a token with loss after truncation."""

    n_repeated: int
    """Rows with the same tokens and labels as an earlier row."""

    n_empty_answers: int
    """Examples whose last answer is empty, so that only its end is learned."""

    n_control_tokens: int
    """Conversations whose content holds control tokens, which are trained on as plain text."""

    n_prompts_cut: int
    """Rows whose last answer lacks the end of the template's generation prompt, such as `<think>`."""

    unread_keys: list[str]
    """Keys of messages that the chat template does not name, such as `timestamp`."""

    closing_tokens: list[int]
    """Tokens that end answers, ascending; empty for texts."""


class Encoder:
    """Makes the rows of a token cache from examples."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        completion_only: bool,
        template_kwargs: Mapping[str, Any],
        one_answer_per_row: bool = False,
    ) -> None:
        """Set up for one tokenizer.

        Args:
            tokenizer: has a chat template if there are conversations.
            completion_only: take the loss on completions (assistant turns) only.
            template_kwargs: variables of the chat template.
            one_answer_per_row: give each answer of a conversation a row of its own, to ask for it.
        """
        self._one_answer_per_row = one_answer_per_row
        self.tokenizer, self._completion_only, self._template_kwargs = tokenizer, completion_only, template_kwargs
        self.template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        self._answers: AnswerParser | None = None
        self.closing_tokens: set[int] = set()
        """Tokens that ended the answers so far."""

        self.n_prompts_cut = 0
        """Rows so far whose last answer lacks the end of the template's generation prompt."""

        self._keys: set[str] = set()

    def rows(self, example: Example) -> list[dict[str, Any]]:
        """Tokenise one example.

        Returns:
            Rows, at least one, of `input_ids` (n,); `labels` (n,), IGNORE for a token without loss; `prompt_ids` (m,),
            from which generation starts, empty if the row has no prompt to answer; `references`, acceptable answers;
            and `calls`, the expected tool calls as of `ParsedAnswer` (the answer as text if they cannot be read), empty
            if there are none. The last row of a conversation has a prompt; all have one if each has one answer.

        Raises:
            DataError: the chat template cannot render the conversation as it is.
        """
        if isinstance(example, TextExample):
            prompt_ids, ids = encode_text(example, self.tokenizer)
            is_all = example.trains_on_prompt or not self._completion_only
            spans = [(0 if is_all else common_prefix(prompt_ids, ids), len(ids))]
            return [_row(ids, spans, prompt_ids, list(example.references), "")]
        assert self.template is not None  # `set_chat_template` checks it
        sequences = encode_chat(example, self.template, self._template_kwargs, one_answer_each=self._one_answer_per_row)
        last = sequences[-1]
        self._keys |= {key for message in example.messages for key in message}
        self.n_prompts_cut += bool(last.prompt_cut.strip())
        self.closing_tokens |= {token for sequence in sequences for token in sequence.closing_tokens}
        self._answers = self._answers or AnswerParser(self.template)
        if not self._completion_only:
            last.spans = [(0, len(last.token_ids))]
            return [self._asked_row(example, last)]
        if self._one_answer_per_row:
            return [self._asked_row(example, one) for one in sequences]
        earlier = [_row(one.token_ids, one.spans, [], [], "") for one in sequences[:-1]]
        return [*earlier, self._asked_row(example, last)]

    def _asked_row(self, example: Conversation, sequence: ChatSequence) -> dict[str, Any]:
        """Return the row of a sequence, with what its last answer is asked by and compared with."""
        assert self._answers is not None
        answer = self._answers.parse(sequence.answer)
        message = example.messages[sequence.message]
        calls = (answer.calls or answer.text) if "tool_calls" in message else ""
        is_last = sequence.message == len(example.messages) - 1
        references = list(example.references) if is_last and example.references else [answer.text]
        prompt_ids = sequence.token_ids[: sequence.start]
        return _row(sequence.token_ids, sequence.spans, prompt_ids, references, calls)

    def unread_keys(self) -> list[str]:
        """Return the keys of messages so far that the chat template does not name."""
        return sorted(key for key in self._keys - READ_KEYS if self.template and not self.template.names(key))


def encode_text(example: TextExample, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt, and of prompt and completion with EOS."""
    prompt, full = example.prompt, example.prompt + example.completion
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if bos and full.startswith(bos) and adds_bos(tokenizer):
        # Rows such as guanaco-llama2's spell out the BOS that the tokenizer adds too. One of the two must go.
        prompt, full = prompt.removeprefix(bos), full.removeprefix(bos)
    if eos and not full.endswith(eos):
        full += eos
    return (tokenizer(prompt).input_ids if prompt else []), tokenizer(full).input_ids


def _row(
    ids: list[int], spans: list[tuple[int, int]], prompt_ids: list[int], references: list[str], calls: str
) -> dict[str, Any]:
    """Return one row of the token cache."""
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return {"input_ids": ids, "labels": labels, "prompt_ids": prompt_ids, "references": references, "calls": calls}


def encode_part(
    examples: list[Example],
    encoder: Encoder,
    *,
    part: str,
    max_length: int,
    long_rows: str,
    on_bad_row: OnBadRow = None,
) -> tuple[datasets.Dataset, PartSummary]:
    """Tokenise one part.

    Args:
        examples: rows of the part, at least one.
        encoder: tokenises one example.
        part: its name, to show how far it is.
        max_length: longest row in tokens.
        long_rows: `truncate` cuts longer rows, `drop` leaves them out.
        on_bad_row: takes the error of each conversation that the chat template cannot render; None raises the first.

    Returns:
        Columns as of `Encoder.rows`, and the summary.

    Raises:
        DataError: no row can be used.
    """
    rows: list[dict[str, Any]] = []
    lengths: list[int] = []
    used: list[Example] = []
    n_cut = n_dropped = 0
    for example in track(examples, f"tokenizing rows of {part}"):
        encoded = []
        with bad_row_to(on_bad_row):
            encoded = encoder.rows(example)
            used.append(example)
        for row in encoded:
            lengths.append(len(row["input_ids"]))
            too_long = lengths[-1] > max_length
            kept = {**row, "input_ids": row["input_ids"][:max_length], "labels": row["labels"][:max_length]}
            n_cut += long_rows == "truncate" and any(label != IGNORE for label in row["labels"][max_length:])
            if (too_long and long_rows == "drop") or all(label == IGNORE for label in kept["labels"]):
                n_dropped += 1
                continue
            rows.append({**kept, "prompt_ids": row["prompt_ids"] if len(row["prompt_ids"]) <= max_length else []})
    if not lengths:
        raise DataError("no row can be used")
    ordered = sorted(lengths)
    summary = PartSummary(
        examples=len(used),
        conversations=sum(not isinstance(example, TextExample) for example in used),
        rows=len(rows),
        tokens=sum(len(row["input_ids"]) for row in rows),
        trained_tokens=sum(label != IGNORE for row in rows for label in row["labels"]),
        length_p50=ordered[len(ordered) // 2],
        length_p95=ordered[int(0.95 * (len(ordered) - 1))],
        length_max=ordered[-1],
        n_long=sum(length > max_length for length in lengths),
        n_cut_answers=n_cut,
        n_dropped=n_dropped,
        n_repeated=len(rows) - len({(*row["input_ids"], None, *row["labels"]) for row in rows}),
        n_empty_answers=sum(not example.has_answer() for example in used),
        n_control_tokens=sum(
            encoder.template.has_control_tokens((example.messages, example.tools))
            for example in used
            if encoder.template and not isinstance(example, TextExample)
        ),
        n_prompts_cut=encoder.n_prompts_cut,
        unread_keys=encoder.unread_keys(),
        closing_tokens=sorted(encoder.closing_tokens),
    )
    columns = {name: [row[name] for row in rows] for name in _FEATURES}
    return datasets.Dataset.from_dict(columns, features=_FEATURES), summary


_IDS = datasets.List(datasets.Value("int32"))

_FEATURES = datasets.Features(
    {
        "input_ids": _IDS,
        "labels": _IDS,
        "prompt_ids": _IDS,
        "references": datasets.List(datasets.Value("string")),
        "calls": datasets.Value("string"),
    }
)
