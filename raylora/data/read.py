"""Finds the rows that a setting names: a file, a pattern, a folder, a URL, or a data set of the Hub."""

import glob
import re
from pathlib import Path

import datasets
import fsspec
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi

from raylora.config.schema import DataSection
from raylora.data.files import CODECS, SUFFIXES, OnBadRow, Row, Rows, file_type, read_file, unreadable
from raylora.errors import DataError, first_line

COMMIT = re.compile("[0-9a-f]{40}")
"""Name of a commit, which no longer has to be looked up."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
"""Split -> words for it in file names, as `datasets` reads them."""


def read_rows(
    source: str,
    *,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    on_bad_row: OnBadRow = None,
) -> dict[str, Rows]:
    """Read all rows of one source.

    Args:
        source: path or URL of a file, pattern such as `rows/*.jsonl`, folder, or Hub data set id, also as `ID:SPLIT`.
        subset: configuration name of a Hub data set.
        split: split of a Hub data set or folder that has several.
        revision: branch, tag or commit of a Hub data set.
        on_bad_row: as for `read_file`.

    Returns:
        File or Hub id -> its rows; at least one row in all.

    Raises:
        DataError: the source is missing, empty, broken (with the line), or of an unknown file type.
    """
    path = Path(source).expanduser()
    if is_hub_source(source):
        name, split = hub_split(source, split)
        found = {name: dict(enumerate(_read_hub(name, subset, split, revision), 1))}
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        found = {source: dict(enumerate(_read_saved(path, split), 1))}
    else:
        found = {file: read_file(file, on_bad_row) for file in _files(source, split)}
    if not any(found.values()):
        raise DataError(f"{source} holds no rows")
    return {name: rows for name, rows in found.items() if rows}


def check_sources(data: DataSection) -> None:
    """Check that the files that settings name are there, before anything that takes long.

    Raises:
        DataError: a file is missing.
    """
    for source in (data.train, data.validation, data.heldout):
        is_path = source is not None and not is_hub_source(source) and "://" not in source
        if source is not None and is_path and not Path(source).expanduser().is_dir():
            _files(source, data.split)


def _files(source: str, split: str) -> list[str]:
    """Return the files that a path, a pattern, a folder or a URL names, sorted.

    Raises:
        DataError: there is none.
    """
    path = Path(source).expanduser()
    if "://" in source:
        return sorted(_urls(source)) if "*" in source else [source]
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        files = [str(file) for file in sorted(path.rglob("*")) if _is_data(file.relative_to(path))]
        return _of_split(files, split, source)
    files = sorted(glob.glob(str(path), recursive=True))
    if not files:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise DataError(f"data file not found: {source}{where}")
    return [file for file in files if file_type(file) in SUFFIXES] or files


def _read_saved(folder: Path, split: str) -> list[Row]:
    """Read a folder that `save_to_disk` of `datasets` wrote."""
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{folder} has no split {split}, only {', '.join(map(str, saved))}")
        saved = saved[split]
    return saved.to_list()


def _urls(pattern: str) -> list[str]:
    """Return the URLs that a pattern names."""
    try:
        files = fsspec.open_files(pattern, "rb")
    except Exception as error:  # beside OSError, each provider of object storage raises its own
        raise DataError(unreadable(pattern, error)) from error
    if not files:
        raise DataError(f"data file not found: {pattern}")
    # adlfs leaves the account of abfs://CONTAINER@ACCOUNT/... out
    place = pattern.partition("://")[2].partition("/")[0]
    return [file.full_name.replace(f"://{place.partition('@')[0]}/", f"://{place}/", 1) for file in files]


def _is_data(path: Path) -> bool:
    """Return True for a data file that is neither hidden, nor in a hidden folder, nor a description of the others."""
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return file_type(str(path)) in SUFFIXES and not hidden and not path.name.startswith("dataset_info")


def _of_split(files: list[str], split: str, folder: str) -> list[str]:
    """Return the files of a split, or all files if their names tell no splits."""
    if not files:
        raise DataError(f"{folder} holds no data file: none ends in {', '.join(SUFFIXES)}")
    by_split: dict[str, list[str]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", str(Path(file).relative_to(Path(folder).expanduser())).lower())
        found = next((name for name, known in SPLITS.items() if set(known) & set(words)), "")
        by_split.setdefault(found, []).append(file)
    if list(by_split) == [""]:
        return files
    if "" in by_split:
        raise DataError(
            f"{folder} has files of the splits {', '.join(filter(None, by_split))} and files of none, such as "
            f"{by_split[''][0]}; name those you mean by a pattern"
        )
    if split not in by_split:
        raise DataError(f"{folder} has no files of split {split}, only of {', '.join(filter(None, by_split))}")
    return by_split[split]


def is_hub_source(source: str) -> bool:
    """Return True for the id of a Hub data set, with or without a split."""
    path = Path(source).expanduser()
    name = source.partition(":")[0]  # a split may be a slice, such as train[:10%]
    is_elsewhere = "://" in source or any(one in name for one in "*?[") or path.exists()
    return not (is_elsewhere or source.count("/") > 1 or path.suffix.lower() in (*SUFFIXES, *CODECS))


def hub_split(source: str, split: str) -> tuple[str, str]:
    """Return the id and the split of a Hub source, `ID` or `ID:SPLIT`; `split` is that of an id alone."""
    name, _, own = source.partition(":")
    return name, own or split


def hub_commit(source: str, revision: str | None) -> str | None:
    """Return the commit of a Hub data set; None for a file, and `revision` as it is if the Hub cannot be asked.

    Args:
        source: as for `read_rows`.
        revision: branch, tag or commit; None is the main branch.
    """
    if not is_hub_source(source):
        return None
    if revision is not None and COMMIT.fullmatch(revision):
        return revision  # pinned at the start of a search that is resumed
    try:
        return HfApi().dataset_info(source.partition(":")[0], revision=revision).sha
    except Exception:  # huggingface_hub passes on errors of its HTTP library; the rows may be in its cache all the same
        return revision


def _read_hub(name: str, subset: str | None, split: str, revision: str | None) -> list[Row]:
    """Read a Hub data set, from the cache of `datasets` if it is there."""
    try:
        return datasets.load_dataset(name, subset, split=split, revision=revision).to_list()
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # a script is refused by a RuntimeError
        what = name if revision is None else f"{name} at revision {revision}"
        raise DataError(
            f"{what} is neither a file here nor a Hub data set that can be loaded: {first_line(error)}; "
            "check the name, the network, and `hf auth login` for a gated one"
        ) from error
