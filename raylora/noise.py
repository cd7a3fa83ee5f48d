"""Keeps the libraries' progress bars and warnings off the terminal; our own errors and tables stay."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Call once at the start of a command or a worker, never on import."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's new output prints even with verbose=0 (Ray 2.60)
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C is handled by `raylora.search`
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the run directory holds its own tables
    warnings.filterwarnings("ignore")
    for name in ("ray", "ray.train", "ray.tune", "transformers", "peft", "trl", "bitsandbytes", "datasets"):
        logging.getLogger(name).setLevel(logging.CRITICAL if name == "ray.tune" else logging.ERROR)
    import datasets  # noqa: PLC0415  # after the environment is set, which these read on import
    import optuna  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
