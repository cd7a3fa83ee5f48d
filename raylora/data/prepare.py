"""Reads, splits and tokenises the data once per search, into a cache keyed by data, tokenizer and settings."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from raylora.config.schema import DataSection
from raylora.data.chat import set_chat_template
from raylora.data.split import PARTS, Parts, read_parts
from raylora.data.tokenize import PartSummary, encode_part
from raylora.errors import DataError
from raylora.run.atomic import read_json, write_json
from raylora.run.lock import made_once

CACHE_VERSION = 1
"""Version of the token cache. Raise it when the form of the cache changes."""

SUMMARY = "summary.json"
"""File that sums a token cache up."""


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
    set_chat_template(parts.train[0], data, tokenizer)
    fingerprint = _fingerprint(parts, data, tokenizer)
    tokens_dir = cache_dir / "tokens" / fingerprint
    return load_prepared(made_once(tokens_dir, partial(_encode_parts, parts, data, tokenizer)))


def load_prepared(tokens_dir: Path) -> PreparedData:
    """Open a token cache that `prepare_data` wrote."""
    values = read_json(tokens_dir / SUMMARY)
    summaries = {part: PartSummary(**values["parts"][part]) for part in PARTS}
    return PreparedData(tokens_dir, tokens_dir.name, summaries, values["n_overlapping"], values["n_duplicates"])


def _encode_parts(parts: Parts, data: DataSection, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write each part as an Arrow data set, and `summary.json`."""
    summaries = {}
    for part in PARTS:
        dataset, summary = encode_part(
            getattr(parts, part),
            tokenizer,
            completion_only=data.completion_only_loss,
            max_length=data.max_length,
            long_rows=data.long_rows,
        )
        if not summary.rows:
            raise DataError(
                f"{part}: no row is left after data.max_length = {data.max_length} with data.long_rows = "
                f"{data.long_rows}; the median row has {summary.length_p50} tokens"
            )
        dataset.save_to_disk(str(directory / part))
        summaries[part] = dataclasses.asdict(summary)
    values = {"parts": summaries, "n_overlapping": parts.n_overlapping, "n_duplicates": parts.n_duplicates}
    write_json(directory / SUMMARY, values)


def _fingerprint(parts: Parts, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of all that decides the tokens: rows, tokenizer, chat template and settings."""
    digest = hashlib.sha256()
    shaping = (CACHE_VERSION, data.completion_only_loss, data.max_length, data.long_rows, tokenizer.chat_template)
    digest.update(json.dumps(shaping).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)).encode())
    digest.update(repr((tokenizer.bos_token, tokenizer.eos_token)).encode())
    for part in PARTS:
        for example in getattr(parts, part):
            digest.update(repr(example).encode())
    return digest.hexdigest()[:16]
