"""Splits examples by prompt into disjoint train, validation and held-out parts."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from raylora.config.schema import DataSection
from raylora.data.examples import Example, has_conversations
from raylora.data.files import OnBadRow, Rows
from raylora.data.formats import detect_format, rename_columns, to_examples, unused_columns
from raylora.data.read import hub_split, read_rows
from raylora.errors import DataError

PARTS = ("train", "validation", "heldout")
"""Names of the parts, and of the settings that name their files."""


OWN_SPLITS = {"validation": "validation", "heldout": "test"}
"""Part -> its split in a folder, or in the Hub data set of the training rows, if the setting names none."""


@dataclass(frozen=True)
class Parts:
    """Three lists of examples that share no prompt."""

    train: list[Example]
    validation: list[Example]
    heldout: list[Example]
    n_overlapping: int
    """Training rows left out because their prompt is also in a given validation or held-out file."""

    n_duplicates: int
    """Training rows that repeat another row word for word. They are not left out."""

    format: str
    """Dataset format of the training rows."""

    unused_columns: list[str]
    """Columns of the training rows that the format does not read."""

    bad_rows: list[DataError]
    """Errors of the rows that were dropped."""

    @property
    def has_conversations(self) -> bool:
        """True if rows are conversations."""
        return any(has_conversations(getattr(self, part)) for part in PARTS)


def read_parts(data: DataSection) -> Parts:
    """Read the sources that `data` names, and split the other parts off the training rows.

    Raises:
        DataError: a source is broken, parts overlap, or there are too few prompts to split.
    """
    bad_rows: list[DataError] = []
    on_bad_row = bad_rows.append if data.bad_rows == "drop" else None
    sources = {part: _Source.read(data, part, on_bad_row) for part in PARTS if getattr(data, part) is not None}
    given = {part: source.examples(data, on_bad_row) for part, source in sources.items()}
    train, n_overlapping = _without_overlap(given, data)
    heldout = given.get("heldout")
    validation = given.get("validation")
    if heldout is None:
        heldout, train = _split_off(train, data.heldout_size, data, "heldout")
    if validation is None:
        validation, train = _split_off(train, data.validation_size, data, "validation")
    parts = {"train": train, "validation": validation, "heldout": heldout}
    for part, examples in parts.items():
        limit = getattr(data, f"max_{part}_rows")
        parts[part] = sorted(examples, key=lambda one: _order(repr(one), data.seed))[:limit] if limit else examples
    return Parts(
        **parts,
        n_overlapping=n_overlapping,
        n_duplicates=len(parts["train"]) - len(set(map(repr, parts["train"]))),
        format=sources["train"].format,
        unused_columns=sources["train"].unused_columns(data, given["train"]),
        bad_rows=bad_rows,
    )


@dataclass(frozen=True)
class _Source:
    """Rows that a setting names."""

    files: dict[str, Rows]
    """File or Hub id -> its rows."""

    format: str
    """Dataset format."""

    @classmethod
    def read(cls, data: DataSection, part: str, on_bad_row: OnBadRow) -> "_Source":
        """Read the source that `data` names for a part."""
        source = getattr(data, part)
        own = hub_split(source, "")[0] == hub_split(data.train, "")[0]  # another data set has commits of its own
        is_split = own or Path(source).expanduser().is_dir()
        files = read_rows(
            source,
            subset=data.subset if own else None,
            split=OWN_SPLITS[part] if part in OWN_SPLITS and is_split else data.split,
            revision=data.revision if own else None,
            on_bad_row=on_bad_row,
        )
        name, rows = next(iter(files.items()))
        first = rename_columns(rows, data.columns, name)
        return cls(files, detect_format(first, name) if data.format == "auto" else data.format)

    def examples(self, data: DataSection, on_bad_row: OnBadRow) -> list[Example]:
        """Convert all rows."""
        return [
            example
            for name, rows in self.files.items()
            for example in to_examples(
                rename_columns(rows, data.columns, name), self.format, source=name, on_bad_row=on_bad_row
            )
        ]

    def unused_columns(self, data: DataSection, examples: list[Example]) -> list[str]:
        """Return the columns of the files that no example holds."""
        rows = (row for rows in self.files.values() for row in rows.values())
        return unused_columns(rows, self.format, data.columns, conversations=has_conversations(examples))


def _without_overlap(given: dict[str, list[Example]], data: DataSection) -> tuple[list[Example], int]:
    """Return the training examples whose prompt is in no other given part, and the number of those left out."""
    if "validation" in given and "heldout" in given:
        shared = {one.key() for one in given["validation"]} & {one.key() for one in given["heldout"]}
        if shared:
            raise DataError(
                f"{data.validation} and {data.heldout} must share no prompt, found {len(shared)}, "
                f"e.g. {min(shared)[:80]}"
            )
    train = given["train"]
    for part in ("validation", "heldout"):
        others = {one.key() for one in given.get(part, [])}
        overlapping = [one for one in train if one.all_keys() & others]
        if overlapping and data.overlap == "error":
            raise DataError(
                f"{data.train} and {getattr(data, part)} must share no prompt, found {len(overlapping)} training rows, "
                f"e.g. {overlapping[0].key()[:80]}; `data.overlap: drop` leaves them out of training"
            )
        train = [one for one in train if not one.all_keys() & others]
    return train, len(given["train"]) - len(train)


def _split_off(
    examples: list[Example], size: float, data: DataSection, part: str
) -> tuple[list[Example], list[Example]]:
    """Split rows off: whole prompts, in an order that depends on the seed alone, until `size` rows are reached.

    Args:
        examples: rows to split.
        size: a share of the rows below 1, or a count.
        data: settings of the data.
        part: `validation` or `heldout`.

    Returns:
        The rows split off, and the others, both in the order of the file.

    Raises:
        DataError: no row would be left.
    """
    target = size if size >= 1 else max(1, round(size * len(examples)))
    groups = _groups(examples)
    taken: set[int] = set()
    for key in sorted(groups, key=lambda key: _order(key, data.seed)):
        if len(taken) >= target:
            break
        if len(groups[key]) <= max(target, len(examples) / len(groups)):  # a prompt of very many rows stays in training
            taken.update(groups[key])
    if len(taken) >= len(examples):
        raise DataError(
            f"{data.train}: cannot split off {target} {part} rows from {len(examples)} rows with {len(groups)} "
            f"different prompts; give more rows, or lower data.{part}_size"
        )
    chosen = [one for index, one in enumerate(examples) if index in taken]
    return chosen, [one for index, one in enumerate(examples) if index not in taken]


def _groups(examples: list[Example]) -> dict[str, list[int]]:
    """Group examples that must stay in one part: those with the same prompt, and those that train on another's prompt.

    Returns:
        Key of a prompt -> indices of the examples.
    """
    parents: dict[str, str] = {one.key(): one.key() for one in examples}

    def root(key: str) -> str:
        while parents[key] != key:
            key = parents[key]
        return key

    for one in examples:
        for key in one.all_keys() & parents.keys():  # an earlier turn may be the last one of another conversation
            first, second = sorted((root(key), root(one.key())))
            parents[second] = first
    groups: dict[str, list[int]] = defaultdict(list)
    for index, one in enumerate(examples):
        groups[root(one.key())].append(index)
    return groups


def _order(key: str, seed: int) -> bytes:
    """Return a sort key that shuffles by the seed. A new row does not change the order of the others."""
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()
