"""Turns examples into token ids and labels, kept as memory-mapped Arrow data sets.

Tokens and labels equal those of TRL's SFTTrainer for the same layout; `tests/test_tokens.py` compares them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from raylora.data.layouts import Example, Message

IGNORE = -100
"""Label of tokens that bear no loss (torch's cross entropy)."""


@dataclass(frozen=True)
class PartSummary:
    """What a user wants to know of one part before the search."""

    rows: int
    tokens: int
    """Tokens after truncation."""

    trained_tokens: int
    """Tokens that bear loss."""

    length_p50: int
    """Median length in tokens before truncation."""

    length_p95: int
    length_max: int
    n_long: int
    """Rows over `max_length`, truncated or dropped."""

    n_dropped: int
    """Rows left out: too long with `long_rows: drop`, or without any token that bears loss."""


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, *, completion_only: bool) -> dict[str, list[int]]:
    """Token ids of one example.

    Returns:
        `input_ids` (n,), `labels` (n,) with IGNORE where no loss is taken, and `prompt_ids` (m,), from which
        generation starts; empty where the example has no prompt.
    """
    if isinstance(example.prompt, str):
        prompt_ids, ids = _encode_text(example, tokenizer)
        spans = [(_common(prompt_ids, ids), len(ids))]
    else:
        prompt_ids, ids, spans = _encode_chat([*example.prompt, *example.completion], tokenizer)
    if example.trains_on_prompt or not completion_only:
        spans = [(0, len(ids))]
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return {"input_ids": ids, "labels": labels, "prompt_ids": prompt_ids}


def _encode_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    assert isinstance(example.prompt, str) and isinstance(example.completion, str)
    prompt, full = example.prompt, example.prompt + example.completion
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if bos and full.startswith(bos) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        # Rows such as guanaco-llama2's spell the BOS that the tokenizer adds by itself; two of them would be wrong.
        prompt, full = prompt.removeprefix(bos), full.removeprefix(bos)
    if eos and not full.endswith(eos):
        full += eos
    return (tokenizer(prompt).input_ids if prompt else []), tokenizer(full).input_ids


def _encode_chat(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Spans cover each assistant turn, found by rendering the conversation up to it and past it."""
    ids = _render(tokenizer, messages)
    spans, prompt_ids = [], []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt_ids = _render(tokenizer, messages[:index], add_generation_prompt=True)
            past = ids if index == len(messages) - 1 else _render(tokenizer, messages[: index + 1])
            spans.append((_common(prompt_ids, ids), _common(past, ids)))
    return prompt_ids, ids, spans


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: bool) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    differing = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def encode_part(
    examples: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_only: bool,
    max_length: int,
    long_rows: str,
) -> tuple[datasets.Dataset, PartSummary]:
    """Tokenises one part, with its rows over `max_length` cut or dropped."""
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


def load_part(tokens_dir: Path, part: str) -> datasets.Dataset:
    """One part of a token cache, memory-mapped: columns `input_ids`, `labels`, `prompt_ids`, `references`."""
    return datasets.load_from_disk(str(tokens_dir / part), keep_in_memory=False)
