"""Chooses what leaves the machine besides trials: settings, scores and files of a run directory, without secrets."""

import re
from pathlib import Path
from typing import Any

from raylora.config.schema import SearchConfig
from raylora.run.atomic import read_json
from raylora.run.directory import RunDirectory

FILES = ("report.md", "rank_vs_loss.md", "rank_vs_loss.csv", "rank_vs_loss.parquet", "trials.parquet")
"""Files of a run directory that are sent, where they exist."""

MERGE_SCORES = ("eval_loss", "heldout_loss", "kl_to_adapter", "token_agreement")

_CREDENTIALS = re.compile(r"(?<=://)[^\s/@|]+@")
_QUERY = re.compile(r"(://[^\s?|'\"]+)\?[^\s|'\"]+")


def without_secrets(text: str) -> str:
    """Return a text whose URLs have no user, password or query: these may be keys or signatures."""
    return _QUERY.sub(r"\1?...", _CREDENTIALS.sub("...@", text))


def search_params(config: SearchConfig, provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a search that a tracker may show.

    They are chosen one by one. Commands, host names, paths and addresses of data stay here.

    Args:
        config: resolved settings.
        provenance: content of `provenance.json`.
    """
    name = config.base_model.name
    return {
        "base_model": Path(name).name if Path(name).is_absolute() else name,
        "base_model_commit": provenance["base_model_commit"],
        "quantization": config.base_model.quantization,
        "data_fingerprint": provenance["data_fingerprint"],
        **{f"data/{part}_rows": values["rows"] for part, values in provenance["data"].items()},
        **_flat("space", config.space),
        **_flat("training", config.training.model_dump(mode="json")),
        **_flat("search", config.search.model_dump(mode="json")),
        "rungs": str(provenance["rungs"]),
        "raylora": provenance["raylora"],
        "git_commit": provenance["git_commit"],
        **_flat("packages", provenance["packages"]),
    }


def scores_of(run: RunDirectory) -> dict[str, float]:
    """Return the figures of the merge and of the held-out check, as far as they are there."""
    scores: dict[str, float] = {}
    if run.merge_file.is_file():
        merge = read_json(run.merge_file)
        for model, values in {**merge["models"], **{f"written_{k}": v for k, v in merge["forms"].items()}}.items():
            scores |= {f"merge/{model}/{name}": values.get(name) for name in MERGE_SCORES}
        scores |= {"merge/loss_increase": merge["loss_increase"], "merge/passed": merge["passed"]}
    if run.evaluation_file.is_file():
        for model, values in read_json(run.evaluation_file)["models"].items():
            scores |= {f"heldout/{model}/{name}": value for name, value in values.items()}
    return {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}


def write_files(run: RunDirectory, folder: Path) -> list[Path]:
    """Write the files to send into a folder, and return their paths."""
    written = []
    for source in (run.path / name for name in FILES):
        if source.is_file():
            target = folder / source.name
            if source.suffix == ".parquet":
                target.write_bytes(source.read_bytes())
            else:
                target.write_text(without_secrets(source.read_text(encoding="utf-8")), encoding="utf-8")
            written.append(target)
    return written


def _flat(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values under `section/name`; what is no plain value is shown as text."""
    plain = (str, int, float, bool)
    return {f"{section}/{k}": v if isinstance(v, plain) else str(v) for k, v in values.items() if v is not None}
