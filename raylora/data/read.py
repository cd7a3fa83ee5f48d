"""Reads a JSONL, JSON, CSV or Parquet file, or a Hub data set, into plain rows."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow.csv
import pyarrow.parquet
from huggingface_hub import HfApi

from raylora.errors import DataError, first_line

Row = dict[str, Any]
"""One row: column -> value."""

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""File types that are read."""

COMMIT = re.compile("[0-9a-f]{40}")
"""Name of a commit, which no longer has to be looked up."""


def read_rows(
    source: str, *, subset: str | None = None, split: str = "train", revision: str | None = None
) -> list[Row]:
    """Read all rows of one source.

    Args:
        source: path of a file, or a Hub data set id.
        subset: configuration name of a Hub data set.
        split: split of a Hub data set.
        revision: branch, tag or commit of a Hub data set.

    Raises:
        DataError: the source is missing, empty, broken (with the line), or of an unknown file type.
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows = _read_file(path)
    elif not is_hub_source(source):
        raise DataError(f"data file not found: {source}")
    else:
        rows = _read_hub(source, subset, split, revision)
    if not rows:
        raise DataError(f"{source} holds no rows")
    return rows


def is_hub_source(source: str) -> bool:
    """Return True for the id of a Hub data set."""
    path = Path(source).expanduser()
    return not (path.exists() or path.suffix.lower() in SUFFIXES or source.count("/") > 1)


def hub_commit(source: str, revision: str | None) -> str | None:
    """Return the commit of a Hub data set; None for a file, and `revision` as it is if the Hub cannot be asked.

    Args:
        source: path of a file, or a Hub data set id.
        revision: branch, tag or commit; None is the main branch.
    """
    if not is_hub_source(source):
        return None
    if revision is not None and COMMIT.fullmatch(revision):
        return revision  # pinned at the start of a search that is resumed
    try:
        return HfApi().dataset_info(source, revision=revision).sha
    except Exception:  # huggingface_hub passes on errors of its HTTP library; the rows may be in its cache all the same
        return revision


def _read_file(path: Path) -> list[Row]:
    """Read a file by its suffix."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: must end in {', '.join(SUFFIXES)}, found {suffix or 'no suffix'}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    try:
        if suffix == ".csv":
            return pyarrow.csv.read_csv(path).to_pylist()
        if suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a readable {suffix[1:]} file: {error}") from error
    return _read_jsonl(path) if suffix == ".jsonl" else _read_json(path)


def _read_jsonl(path: Path) -> list[Row]:
    """Read a file with a JSON object per line. Blank lines are skipped."""
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_parse(line, f"{path}:{number}"))
                if not isinstance(rows[-1], dict):
                    raise DataError(f"{path}:{number}: must be a JSON object, found {line.strip()[:60]}")
    return rows


def _read_json(path: Path) -> list[Row]:
    """Read a JSON array of objects, or an object whose only value is such an array."""
    rows = _parse(path.read_text(encoding="utf-8-sig"), str(path))
    if isinstance(rows, dict) and len(rows) == 1:
        (rows,) = rows.values()
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: must be a JSON array of objects")
    return rows


def _parse(text: str, where: str) -> Any:
    """Parse JSON. `where` opens the error message."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON: {error.msg} at column {error.colno}: {text.strip()[:60]}") from error


def _read_hub(name: str, subset: str | None, split: str, revision: str | None) -> list[Row]:
    """Read a Hub data set, from the cache of `datasets` if it is there."""
    try:
        return datasets.load_dataset(name, subset, split=split, revision=revision).to_list()
    except (OSError, ValueError) as error:  # huggingface_hub's and datasets' errors derive from these
        what = name if revision is None else f"{name} at revision {revision}"
        raise DataError(
            f"{what} is neither a file here nor a Hub data set that can be loaded: {first_line(error)}; "
            "check the name, the network, and `hf auth login` for a gated one"
        ) from error
