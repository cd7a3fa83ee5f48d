"""Finds the tokens of a run, or makes them again: the cache may be deleted and a run directory moved at any time."""

from pathlib import Path

from raylora.base.locate import find_checkpoint, load_tokenizer
from raylora.config.schema import SearchConfig
from raylora.data.prepare import prepare_data
from raylora.run.directory import RunDirectory, check_same_data


def tokens_of_run(run: RunDirectory, config: SearchConfig) -> Path:
    """Return the token cache that a run was started with.

    Raises:
        RunDirectoryError: it is gone, and the data or the tokenizer have changed since.
        DataError: it is gone, and so are the data.
    """
    cache_dir = run.cache(config)
    tokens_dir = cache_dir / "tokens" / run.provenance()["data_fingerprint"]
    if not tokens_dir.is_dir():
        tokenizer = load_tokenizer(config.base_model, find_checkpoint(config.base_model, cache_dir))
        check_same_data(run, prepare_data(config.data, tokenizer, cache_dir).fingerprint)
    return tokens_dir
