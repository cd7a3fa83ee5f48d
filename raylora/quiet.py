"""Keeps the libraries' progress bars, log lines and known warnings off the terminal. Our own errors and tables stay."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

STDERR = 2
"""File descriptor of standard error."""

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's new output prints even with verbose=0 (Ray 2.60)
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is handled by `raylora.search.ray.run`
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run directory holds its own tables
}
"""Switches that the libraries read when they are imported. A value that the user has set is kept."""

LOG_LEVELS = {
    "ray": logging.ERROR,
    "ray.train": logging.ERROR,
    "ray.tune": logging.CRITICAL,
    "transformers": logging.ERROR,
    "peft": logging.ERROR,
    "trl": logging.ERROR,
    "bitsandbytes": logging.ERROR,
    "datasets": logging.ERROR,
    # each failed request of object storage with its traceback; `Storage` says it in one sentence
    "gcsfs": logging.CRITICAL,
    "azure": logging.CRITICAL,
}
"""Logger name -> lowest level that is shown."""

WARNINGS = (
    # adapters have no base's name while they train, as peft would ask the Hub for it at each checkpoint
    "The PEFT config's `base_model_name_or_path` was renamed",
    # peft says that it has mended it
    "fan_in_fan_out is set to",
    # the merge reads an adapter onto a base without weights on purpose
    ".*copying from a non-meta parameter",
    # the merge unties embeddings and output head where an adapter changes one of them
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
    # transformers announces changes for its version 6, which pyproject.toml excludes
    ".*will be removed in v6",
    # multivariate TPE with groups, and constraints
    ".*is an? experimental feature",
    ".*is experimental \\(supported from",
    # the merge multiplies by few moved weights
    "Sparse CSR tensor support is in beta state",
)
"""Beginnings of warnings that are known and change nothing, as regular expressions; others are shown."""


@contextmanager
def output_into(path: Path) -> Iterator[None]:
    """Append what libraries print inside the block to a file. A stream that was opened before it still works.

    Ray's own code writes to standard error past Python, as when a node dies, and its warnings to `sys.stdout`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    kept = os.dup(STDERR)
    with path.open("a", encoding="utf-8", buffering=1) as file:
        os.dup2(file.fileno(), STDERR)
        try:
            with redirect_stdout(file):
                yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, STDERR)
            os.close(kept)


def quiet_libraries() -> None:
    """Set switches, log levels and warning filters; called at the start of a command or worker."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
