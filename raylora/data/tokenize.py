"""Turns examples into token ids and labels, as Arrow data sets that can be memory-mapped.

Tokens and labels equal those of TRL's SFTTrainer for the same dataset format; `tests/data/test_tokenize.py` compares
them.
"""

from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from raylora.data.chat import common_prefix, encode_chat
from raylora.data.formats import Example
from raylora.data.rows import IGNORE


@dataclass(frozen=True)
class PartSummary:
    """Size of one part, shown to the user before the search."""

    rows: int
    """Rows in the token cache."""

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

    n_dropped: int
    """Rows left out: too long with `long_rows: drop`, or without a token with loss."""


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, *, completion_only: bool) -> dict[str, list[int]]:
    """Tokenise one example.

    Args:
        example: one row.
        tokenizer: has a chat template if the row is a conversation.
        completion_only: take the loss on completions (assistant turns) only.

    Returns:
        `input_ids` (n,); `labels` (n,), IGNORE for a token without loss; and `prompt_ids` (m,), from which generation
        starts, empty if the example has no prompt.
    """
    if isinstance(example.prompt, str):
        prompt_ids, ids = _encode_text(example, tokenizer)
        spans = [(common_prefix(prompt_ids, ids), len(ids))]
    else:
        prompt_ids, ids, spans = encode_chat([*example.prompt, *example.completion], tokenizer)
    if example.trains_on_prompt or not completion_only:
        spans = [(0, len(ids))]
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return {"input_ids": ids, "labels": labels, "prompt_ids": prompt_ids}


def _encode_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt, and of prompt and completion with EOS."""
    assert isinstance(example.prompt, str) and isinstance(example.completion, str)
    prompt, full = example.prompt, example.prompt + example.completion
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if bos and full.startswith(bos) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        # Rows such as guanaco-llama2's spell out the BOS that the tokenizer adds too. One of the two must go.
        prompt, full = prompt.removeprefix(bos), full.removeprefix(bos)
    if eos and not full.endswith(eos):
        full += eos
    return (tokenizer(prompt).input_ids if prompt else []), tokenizer(full).input_ids


def encode_part(
    examples: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_only: bool,
    max_length: int,
    long_rows: str,
) -> tuple[datasets.Dataset, PartSummary]:
    """Tokenise one part.

    Args:
        examples: rows of the part, at least one.
        tokenizer: has a chat template if the rows are conversations.
        completion_only: take the loss on completions (assistant turns) only.
        max_length: longest row in tokens.
        long_rows: `truncate` cuts longer rows, `drop` leaves them out.

    Returns:
        Columns `input_ids`, `labels`, `prompt_ids`, `references`; and the summary.
    """
    rows: list[dict[str, Any]] = []
    lengths = []
    for example in examples:
        encoded = encode(example, tokenizer, completion_only=completion_only)
        lengths.append(len(encoded["input_ids"]))
        too_long = lengths[-1] > max_length
        labels = encoded["labels"][:max_length]
        if (too_long and long_rows == "drop") or all(label == IGNORE for label in labels):
            continue
        prompt_ids = encoded["prompt_ids"] if len(encoded["prompt_ids"]) <= max_length else []
        ids = encoded["input_ids"][:max_length]
        references = list(example.references)
        rows.append({"input_ids": ids, "labels": labels, "prompt_ids": prompt_ids, "references": references})
    ordered = sorted(lengths)
    summary = PartSummary(
        rows=len(rows),
        tokens=sum(len(row["input_ids"]) for row in rows),
        trained_tokens=sum(label != IGNORE for row in rows for label in row["labels"]),
        length_p50=ordered[len(ordered) // 2],
        length_p95=ordered[int(0.95 * (len(ordered) - 1))],
        length_max=ordered[-1],
        n_long=sum(length > max_length for length in lengths),
        n_dropped=len(examples) - len(rows),
    )
    columns = {name: [row[name] for row in rows] for name in _FEATURES}
    return datasets.Dataset.from_dict(columns, features=_FEATURES), summary


_IDS = datasets.List(datasets.Value("int32"))

_FEATURES = datasets.Features(
    {"input_ids": _IDS, "labels": _IDS, "prompt_ids": _IDS, "references": datasets.List(datasets.Value("string"))}
)
