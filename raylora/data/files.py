"""Reads one data file into plain rows: JSONL, JSON, CSV, TSV or Parquet, compressed or not, here or behind a URL."""

import csv
import io
import json
import re
import sys
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet

from raylora.data.messages import strings
from raylora.errors import DataError, first_line
from raylora.run.storage import EXTRAS, explain

Row = dict[str, Any]
"""One row: column -> value."""

Rows = dict[int, Row]
"""Number -> row. Rows are counted from 1; those of JSONL have the number of their line."""

OnBadRow = Callable[[DataError], None] | None
"""Takes the error of each row that cannot be used; None raises the first."""

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""File types that are read."""

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
"""Suffix of a compressed file -> codec by its name in pyarrow."""

BYTE_ORDER_MARKS = {BOM_UTF8: "utf-8-sig", BOM_UTF16_LE: "utf-16", BOM_UTF16_BE: "utf-16"}
"""First bytes of a text -> its encoding."""

ROW_COLUMNS = {"messages", "conversations", "prompt", "completion", "instruction"}
"""Columns by which a JSON object is known as a row, and not as a container of rows."""

DELIMITERS = ",;\t|"
"""Delimiters of CSV files, of which the one that gives the header most columns is taken."""

_LINE_END = re.compile("\r\n|\n|\r")

_SURROGATE = re.compile("[\ud800-\udfff]")


@contextmanager
def bad_row_to(on_bad_row: OnBadRow) -> Iterator[None]:
    """Give the error of a row to `on_bad_row`, and go on.

    Raises:
        DataError: there is no `on_bad_row`; the message names the setting that leaves such rows out.
    """
    try:
        yield
    except DataError as error:
        if on_bad_row is None:
            raise DataError(f"{error}; `data.bad_rows: drop` leaves such rows out") from error
        on_bad_row(error)


def file_type(path: str) -> str:
    """Return the suffix that tells how to read a file, without that of its compression; empty if there is none."""
    name = _name(path)
    return PurePosixPath(name.stem).suffix if name.suffix in CODECS else name.suffix


def _name(path: str) -> PurePosixPath:
    """Return a path or URL in lower case, without the query of a URL such as `?download=true`."""
    return PurePosixPath(re.sub(r"^(https?://[^?#]*)[?#].*", r"\1", path.lower()))


def read_file(path: str, on_bad_row: OnBadRow = None) -> Rows:
    """Read all rows of a file.

    Args:
        path: local path, or URL of a file system that fsspec knows.
        on_bad_row: takes the error of each broken line of JSONL, and of each row that cannot be used.

    Raises:
        DataError: the file is missing, empty, broken (with the line), in an unknown encoding, or of an unknown type.
    """
    type = file_type(path)
    if type not in SUFFIXES:
        raise DataError(
            f"{path}: must end in {', '.join(SUFFIXES)}, or in one of these and {', '.join(CODECS)}, "
            f"found {type or 'no suffix'}"
        )
    content = _content(path)
    if not content:
        raise DataError(f"{path} is empty")
    if type == ".parquet":
        try:
            table = pyarrow.parquet.read_table(pa.BufferReader(content))
            return dict(enumerate(table.to_pylist(maps_as_pydicts="lossy"), 1))
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the latter two of a date
            raise DataError(f"{path} is not a readable parquet file: {first_line(error)}") from error
    text = _decoded(content, path)
    if type in (".csv", ".tsv"):
        return _read_csv(text, path, on_bad_row)
    return _read_json(text, path, on_bad_row) if type == ".json" else _read_jsonl(text, path, on_bad_row)


def _content(path: str) -> bytes:
    """Return the bytes of a file, decompressed."""
    codec = CODECS.get(_name(path).suffix)
    try:
        with fsspec.open(path, "rb") as file:
            return pa.CompressedInputStream(file, codec).read() if codec else file.read()
    except FileNotFoundError as error:
        raise DataError(f"data file not found: {path}") from error
    except Exception as error:  # beside OSError, each provider of object storage raises its own
        raise DataError(unreadable(path, error)) from error


def unreadable(path: str, error: Exception) -> str:
    """Return why a path or URL cannot be read, as one sentence."""
    if path.partition("://")[0] in EXTRAS:
        return explain(path, error, needed="list and read")
    what = path if isinstance(error, ImportError) else f"{path} cannot be read"  # fsspec names the package
    return f"{what}: {first_line(error)}"


def _decoded(content: bytes, path: str) -> str:
    """Decode text by its byte order mark; without one it must be UTF-8."""
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        guess = "utf-16" if b"\0" in content[:100] else "cp1252"
        raise DataError(
            f"{path}:{line} is not {encoding.upper()}: byte 0x{content[error.start]:02x}; if it is {guess}, convert "
            f"it by `iconv -f {guess} -t utf-8 FILE > NEW`"
        ) from error


def _read_jsonl(text: str, path: str, on_bad_row: OnBadRow) -> Rows:
    """Read a JSON object per line. Blank lines are skipped."""
    rows = {}
    for number, line in enumerate(_LINE_END.split(text), 1):
        if line.strip():
            with bad_row_to(on_bad_row):
                rows[number] = _parse_row(line, f"{path}:{number}")
    return rows


def _read_json(text: str, path: str, on_bad_row: OnBadRow) -> Rows:
    """Read a JSON array of objects, an object whose only value is such an array, or a JSON object per line."""
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _read_jsonl(text, path, on_bad_row)
        raise DataError(f"{path}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of more than 4,300 digits, or brackets too deep
        raise DataError(f"{path}: JSON that cannot be read: {first_line(error)}") from error
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = [rows] if rows.keys() & ROW_COLUMNS else lists[0] if len(lists) == 1 else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: must be a JSON array of objects")
    checked = {}
    for number, row in enumerate(rows, 1):
        with bad_row_to(on_bad_row):
            _check_text(row, f"{path}: row {number}")
            checked[number] = row
    return checked


def _read_csv(text: str, path: str, on_bad_row: OnBadRow) -> Rows:
    """Read delimited text with a header. Every value is text; line breaks in quotes are kept as they are."""
    csv.field_size_limit(sys.maxsize)  # 128 KiB by default, which long answers exceed
    text = text.lstrip("\r\n")
    header, *rest = _LINE_END.split(text, maxsplit=1)
    if declared := re.fullmatch("sep=(.)", header):  # Excel's own first line
        text = "".join(rest).lstrip("\r\n")
        header = _LINE_END.split(text, maxsplit=1)[0]
    possible = declared[1] if declared else "\t" if file_type(path) == ".tsv" else DELIMITERS
    delimiter = max(possible, key=lambda one: len(next(csv.reader([header], delimiter=one), [])))
    # `prompt, completion` has a space after each delimiter, which belongs to no value
    spaced = delimiter not in " \t" and f"{delimiter} " in header
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=spaced)
    try:
        names = [name.strip() for name in next(reader, [])]
        named = [name for name in names if name]  # pandas' index has no name
        if not named or len(set(named)) < len(named):
            raise DataError(f"{path}:1: each column needs a name of its own, found {', '.join(names) or 'nothing'}")
        rows: Rows = {}
        for number, values in enumerate((values for values in reader if values), 1):  # a blank line has no values
            with bad_row_to(on_bad_row):
                if len(values) != len(names):
                    raise DataError(f"{path}:{reader.line_num}: {len(names)} columns expected, found {len(values)}")
                rows[number] = {name: value for name, value in zip(names, values, strict=True) if name}
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: broken CSV: {error}") from error
    return rows


def _parse_row(text: str, where: str) -> Row:
    """Parse a JSON object. `where` opens the error message."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON: {error.msg} at column {error.colno}: {text.strip()[:60]}") from error
    except (ValueError, RecursionError) as error:  # a number of more than 4,300 digits, or brackets too deep
        raise DataError(f"{where}: JSON that cannot be read: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be a JSON object, found {text.strip()[:60]}")
    _check_text(value, where)
    return value


def _check_text(value: Any, where: str) -> None:
    """Check that all strings can be encoded. JSON can spell half of a character, such as `\\ud83d`."""
    if any(_SURROGATE.search(text) for text in strings(value)):
        raise DataError(
            f"{where}: holds half of a surrogate pair, such as \\ud83d, which is no character; "
            "cut texts between characters, or write the file with ensure_ascii=False"
        )
