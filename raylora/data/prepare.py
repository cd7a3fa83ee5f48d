"""Reads, splits and tokenises the data once per search, into a cache keyed by data, tokenizer and settings."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raylora.config.schema import DataSection
from raylora.data.chat_template import set_chat_template, stop_token_ids
from raylora.data.split import PARTS, Parts, read_parts
from raylora.data.tokenize import Encoder, PartSummary, encode_part
from raylora.errors import DataError
from raylora.run.atomic import read_json, write_json
from raylora.run.lock import made_once

CACHE_VERSION = 4
"""Version of the token cache. Raise it when the form of the cache changes."""

SUMMARY = "summary.json"
"""File that sums a token cache up."""

FEW = 0.03
"""Largest share of odd rows without a warning. Our choice."""

TOKENIZER = "tokenizer"
"""Folder of a token cache with the tokenizer, as it made the tokens."""


@dataclass(frozen=True)
class PreparedData:
    """A token cache and a summary of its content."""

    tokens_dir: Path
    """Directory with one Arrow data set per part, for `load_part`."""

    fingerprint: str
    """Hash of the rows, the tokenizer and the settings that shape tokens: 16 hexadecimal digits."""

    summaries: dict[str, PartSummary]
    """Part (`train`, `validation`, `heldout`) -> summary."""

    n_overlapping: int
    """Training rows left out, as in `Parts`."""

    n_duplicates: int
    """Repeated training rows, as in `Parts`."""

    bad_rows: list[str]
    """Messages of the rows that were dropped because they could not be used."""

    unused_columns: list[str]
    """Columns of the training rows that the dataset format does not read."""

    stop_token_ids: list[int]
    """Tokens that end answers: EOS, and what the chat template ends them in. Ascending."""

    def tokenizer(self, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        """Load the tokenizer that made the tokens, with its chat template."""
        return AutoTokenizer.from_pretrained(self.tokens_dir / TOKENIZER, trust_remote_code=trust_remote_code)

    def longest(self, data: DataSection) -> int:
        """Return the tokens of the longest row, after truncation."""
        return min(data.max_length, max(part.length_max for part in self.summaries.values()))

    def check_positions(self, data: DataSection, n_positions: int | None) -> None:
        """Check that a base has an embedding for each position of the longest row.

        Args:
            data: settings of the data.
            n_positions: positions of the base; None sets no limit.

        Raises:
            DataError: a row is longer.
        """
        longest = self.longest(data)
        if n_positions is not None and longest > n_positions:
            raise DataError(
                f"the longest row has {longest} tokens, and the base has positions for {n_positions}; set "
                f"data.max_length to {n_positions}, or name a base for longer texts"
            )

    def facts(self) -> dict[str, dict[str, Any]]:
        """Return part -> fields of its summary."""
        return {part: dataclasses.asdict(summary) for part, summary in self.summaries.items()}

    def notes(self) -> list[str]:
        """Return what a user should know about the rows, one sentence each. More than a few per cent is a warning."""
        lines = [line for part, summary in self.summaries.items() for line in _notes(part, summary)]
        if self.bad_rows:
            lines.append(f"warning: {len(self.bad_rows)} rows dropped; the first: {self.bad_rows[0]}")
        if keys := self.summaries["train"].unread_keys:
            lines.append(f"note: keys of messages not used: {', '.join(keys)}")
        if self.unused_columns:
            lines.append(f"note: columns not used: {', '.join(self.unused_columns)}")
        return lines


def _notes(part: str, summary: PartSummary) -> Iterator[str]:
    """Yield a sentence for each count of a part that is not 0."""
    for count, total, what in (
        (summary.n_cut_answers, summary.rows + summary.n_dropped, "rows lose the end of an answer to data.max_length"),
        (summary.n_dropped, summary.rows + summary.n_dropped, "rows are left out for their length"),
        (summary.n_repeated, summary.rows, "rows have the tokens of an earlier row"),
        (summary.n_empty_answers, summary.examples, "answers are empty, so that only their end is learned"),
        (summary.n_control_tokens, summary.examples, "conversations spell control tokens, which are read as text"),
        (
            summary.n_prompts_cut,
            summary.examples,
            "answers lack the end of the template's generation prompt, such as <think>; ask the model without it",
        ),
    ):
        if count:
            yield f"{'warning' if count > FEW * total else 'note'}: {part}: {count} of {total} {what}"


def prepare_data(data: DataSection, tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> PreparedData:
    """Tokenise the three parts, unless the cache holds them.

    Args:
        data: settings of the data.
        tokenizer: given the chat template that `data` names.
        cache_dir: holds token caches.

    Raises:
        DataError: a source is broken, parts overlap, nothing is left to train on, or a chat template is missing.
    """
    parts = read_parts(data)
    set_chat_template(data, parts.format, tokenizer, has_conversations=parts.has_conversations)
    fingerprint = _fingerprint(parts, data, tokenizer)
    tokens_dir = cache_dir / "tokens" / fingerprint
    return load_prepared(made_once(tokens_dir, partial(_encode_parts, parts, data, tokenizer)))


def load_prepared(tokens_dir: Path) -> PreparedData:
    """Open a token cache that `prepare_data` wrote.

    Raises:
        DataError: another version of raylora wrote it.
    """
    values = read_json(tokens_dir / SUMMARY)
    if values.pop("version", None) != CACHE_VERSION:
        raise DataError(f"{tokens_dir} was written by another version of raylora; start the search in a new directory")
    summaries = {part: PartSummary(**summary) for part, summary in values.pop("parts").items()}
    return PreparedData(tokens_dir, tokens_dir.name, summaries, **values)


def _encode_parts(parts: Parts, data: DataSection, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write each part as an Arrow data set, the tokenizer with its chat template, and `summary.json`."""
    bad_rows = list(parts.bad_rows)
    summaries: dict[str, PartSummary] = {}
    for part in PARTS:
        encoder = Encoder(
            tokenizer,
            completion_only=data.completion_only_loss,
            template_kwargs=data.chat_template_kwargs,
            one_answer_per_row=part == "heldout",
        )
        dataset, summaries[part] = encode_part(
            getattr(parts, part),
            encoder,
            part=part,
            max_length=data.max_length,
            long_rows=data.long_rows,
            on_bad_row=bad_rows.append if data.bad_rows == "drop" else None,
        )
        if not summaries[part].rows:
            raise DataError(
                f"{part}: no row is left after data.max_length = {data.max_length} with data.long_rows = "
                f"{data.long_rows}; the median row has {summaries[part].length_p50} tokens"
            )
        if part == "train" and summaries[part].n_empty_answers == summaries[part].examples:
            raise DataError(f"{part}: every answer is empty, so that there is nothing to learn but the end of a text")
        dataset.save_to_disk(str(directory / part))
    tokenizer.save_pretrained(directory / TOKENIZER)
    ends = {*stop_token_ids(tokenizer), *(token for one in summaries.values() for token in one.closing_tokens)}
    values = {
        "version": CACHE_VERSION,
        "parts": {part: dataclasses.asdict(summary) for part, summary in summaries.items()},
        "n_overlapping": parts.n_overlapping,
        "n_duplicates": parts.n_duplicates,
        "bad_rows": list(map(str, bad_rows)),
        "unused_columns": parts.unused_columns,
        "stop_token_ids": sorted(ends),
    }
    write_json(directory / SUMMARY, values)


def _fingerprint(parts: Parts, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of all that decides the tokens: rows, tokenizer, chat template and settings."""
    digest = hashlib.sha256()
    shaping = (data.completion_only_loss, data.max_length, data.long_rows, data.chat_template_kwargs, data.bad_rows)
    digest.update(json.dumps((CACHE_VERSION, tokenizer.chat_template, *shaping)).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)).encode())
    digest.update(repr((tokenizer.bos_token, tokenizer.eos_token)).encode())
    for part in PARTS:
        for example in getattr(parts, part):
            digest.update(repr(example).encode())
    return digest.hexdigest()[:16]
