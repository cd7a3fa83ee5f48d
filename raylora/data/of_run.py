"""Finds the tokens of a run, or makes them again: the cache may be deleted and a run directory moved at any time."""

from raylora.base.locate import find_checkpoint, load_tokenizer
from raylora.config.schema import SearchConfig
from raylora.data.prepare import PreparedData, load_prepared, prepare_data
from raylora.run.directory import RunDirectory, check_same_data


def data_of_run(run: RunDirectory, config: SearchConfig) -> PreparedData:
    """Return the prepared data that a run was started with.

    Raises:
        RunDirectoryError: the cache is gone, and the data or the tokenizer have changed since.
        DataError: the cache is gone, and so are the data.
    """
    cache_dir = run.cache(config)
    tokens_dir = cache_dir / "tokens" / run.provenance()["data_fingerprint"]
    if tokens_dir.is_dir():
        return load_prepared(tokens_dir)
    tokenizer = load_tokenizer(config.base_model, find_checkpoint(config.base_model, cache_dir))
    data = prepare_data(config.data, tokenizer, cache_dir)
    check_same_data(run, data.fingerprint)
    return data
