"""Files and folders that users bring are read, or refused with the line and the cure."""

import bz2
import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from raylora.config import DataSection
from raylora.data import prepare_data
from raylora.data.examples import Conversation
from raylora.data.files import file_type, read_file
from raylora.data.formats import to_examples
from raylora.data.read import hub_split, is_hub_source, read_rows
from raylora.data.split import read_parts
from raylora.errors import DataError

ROWS = [{"prompt": f"frage {n} ä", "completion": f"antwort {n}"} for n in range(20)]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rows_of(source: str, **options: str) -> list[dict]:
    (rows,) = read_rows(source, **options).values()
    return list(rows.values())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_by_its_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS).encode(encoding))
    assert list(read_file(str(path)).values()) == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines(ROWS).encode("cp1252"), r"x\.jsonl:1 is not UTF-8: byte 0xe4; if it is cp1252, convert it by `iconv"),
        (lines(ROWS).encode("utf-16-le"), r"x\.jsonl:1.* is utf-16, convert it by `iconv -f utf-16"),
        (b'{"a": "x"}\n{"a": "\\ud83d"}\n', r"x\.jsonl:2: holds half of a surrogate pair"),
        (b'{"a": 1}\n\n{"a"}\n', r"x\.jsonl:3: broken JSON"),
    ],
)
def test_text_that_cannot_be_read_names_the_line_and_the_cure(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_file(str(path))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_compressed_files_are_read(suffix: str, tmp_path: Path) -> None:
    path, content = tmp_path / f"rows.jsonl{suffix}", lines(ROWS).encode()
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda text: pa.compress(text, "zstd", asbytes=True)}
    if suffix == ".zst":  # pyarrow.compress leaves the frame out that zstd files have
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
    else:
        path.write_bytes(packed[suffix](content))
    assert list(read_file(str(path)).values()) == ROWS


def test_csv_values_are_text_with_their_line_breaks(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": "a\r\nb\n" * 20} for n in range(20_000)]  # over 1 MiB
    rows.append({"prompt": "label", "completion": "0"})
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    assert list(read_file(str(path)).values()) == rows


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ";"), ("a.csv", ","), ("a.tsv", "\t")])
def test_delimiters_are_told_from_the_header(name: str, delimiter: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(f'prompt{delimiter}completion\n"q"{delimiter}1\n')
    assert read_file(str(tmp_path / name)) == {1: {"prompt": "q", "completion": "1"}}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pandas.csv", ",prompt,completion\n0,q0,a0\n1,q1,a1\n"),  # with its index
        ("excel.csv", "prompt,completion,\nq0,a0,\nq1,a1,\n"),
        ("pandas.tsv", "\tprompt\tcompletion\n0\tq0\ta0\n1\tq1\ta1\n"),
        ("spaced.csv", 'prompt, completion\n"q0", "a0"\nq1, a1\n'),
        ("blank.csv", "\r\n\nprompt,completion\nq0,a0\nq1,a1\n"),
    ],
)
def test_headers_of_pandas_excel_and_people_are_read(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert rows_of(str(tmp_path / name)) == [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(2)]


def test_a_space_that_opens_a_value_stays(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion\nq0, a0\n")
    assert rows_of(str(tmp_path / "rows.csv")) == [{"prompt": "q0", "completion": " a0"}]


def test_a_csv_without_a_header_says_so(tmp_path: Path) -> None:
    for content in ("sep=;", "sep=;\n", ",,\n1,2,3\n"):
        (tmp_path / "rows.csv").write_text(content)
        with pytest.raises(DataError, match=r"rows\.csv:1: each column needs a name"):
            rows_of(str(tmp_path / "rows.csv"))


def test_a_json_file_of_one_row_may_hold_other_lists(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q"}], "tools": [{"name": "f"}], "tags": ["x"]}
    for one in (row, {"instruction": "add", "output": "2", "tags": [{"name": "x"}]}):
        (tmp_path / "row.json").write_text(json.dumps(one))
        assert rows_of(str(tmp_path / "row.json")) == [one]


def test_the_query_of_a_url_is_not_its_file_type() -> None:
    assert file_type("https://x.org/a/rows.jsonl.gz?download=true") == ".jsonl"
    assert file_type("https://x.org/rows.csv#top") == ".csv"
    assert file_type("odd?name.jsonl") == ".jsonl"


def test_maps_of_parquet_are_messages(tmp_path: Path) -> None:
    turns = [[("role", "user"), ("content", "q")], [("role", "assistant"), ("content", "a")]]
    table = pa.table({"messages": pa.array([turns], pa.list_(pa.map_(pa.string(), pa.string())))})
    pa.parquet.write_table(table, tmp_path / "rows.parquet")
    assert rows_of(str(tmp_path / "rows.parquet")) == [{"messages": [dict(turn) for turn in turns]}]


def test_a_date_that_python_has_not_is_said_to_be_unreadable(tmp_path: Path) -> None:
    table = pa.table({"text": ["x"], "day": pa.array([2**30], pa.date32())})
    pa.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet is not a readable parquet file"):
        rows_of(str(tmp_path / "rows.parquet"))


def test_a_broken_csv_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\nq,a\nq\n")
    with pytest.raises(DataError, match=r"a\.csv:3: 2 columns expected, found 1"):
        read_file(str(tmp_path / "a.csv"))


def test_rows_of_jsonl_are_named_by_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"\n{lines(ROWS[:1])}\n{lines(ROWS[1:2])}", encoding="utf-8")
    rows = read_file(str(tmp_path / "a.jsonl"))
    assert rows == {2: ROWS[0], 4: ROWS[1]}
    with pytest.raises(DataError, match="x: row 4 has no text"):
        to_examples({2: {"text": "a"}, 4: {"text": None}}, "text", source="x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text"}\n[1]\n{"text": "b"}\n', "a.jsonl:2: broken JSON"),
        ("a.csv", "text\na\nb,c\nd,e\nf\n", "a.csv:3: 1 columns expected, found 2"),
        (
            "a.json",
            '[{"text": "a"}, {"text": "\\ud83d"}, {"text": "\\ud83d"}, {"text": "b"}]',
            "a.json: row 2: holds half",
        ),
    ],
)
def test_broken_rows_can_be_dropped(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    errors: list[DataError] = []
    assert list(read_file(str(tmp_path / name), errors.append)) == [1, 4]
    assert len(errors) == 2 and message in str(errors[0])
    with pytest.raises(DataError, match=f"{re.escape(message)}.*; `data.bad_rows: drop` leaves such rows out$"):
        read_file(str(tmp_path / name))


def test_json_files_of_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(lines(ROWS), encoding="utf-8")
    assert list(read_file(str(tmp_path / "a.json")).values()) == ROWS


def test_patterns_folders_and_urls_name_files(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"part-{number}.jsonl").write_text(lines(ROWS[number::2]), encoding="utf-8")
    (tmp_path / "README.md").write_text("not data")
    for source in (str(tmp_path), f"{tmp_path}/*.jsonl", f"file://{tmp_path}/*.jsonl"):
        found = read_rows(source)
        assert [len(rows) for rows in found.values()] == [10, 10]
    with fsspec.open("memory://bucket/rows.jsonl", "w") as file:
        file.write(lines(ROWS))
    assert rows_of("memory://bucket/rows.jsonl") == ROWS


def test_a_folder_with_splits_gives_the_one_that_is_asked_for(tmp_path: Path) -> None:
    for split, rows in (("train", ROWS[:15]), ("test", ROWS[15:])):
        pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}-00000-of-00001.parquet")
    assert rows_of(str(tmp_path)) == ROWS[:15]
    assert rows_of(str(tmp_path), split="test") == ROWS[15:]
    with pytest.raises(DataError, match="has no files of split validation, only of test, train"):
        read_rows(str(tmp_path), split="validation")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/*.jsonl", r"data file not found: nowhere/\*\.jsonl"),
        ("s4://bucket/rows.jsonl", "s4://bucket/rows.jsonl cannot be read: Protocol not known: s4"),
        ("memory://bucket/none.jsonl", "data file not found: memory://bucket/none.jsonl"),
        ("memory://bucket/*.none", r"data file not found: memory://bucket/\*\.none"),
    ],
)
def test_sources_that_are_not_there_say_so(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(source)


def test_hub_sources_are_told_from_files(tmp_path: Path) -> None:
    assert is_hub_source("owner/name")
    assert is_hub_source("owner/name:test")
    for source in ("rows.jsonl", "rows.jsonl.gz", "folder/*.csv", "s3://bucket/rows", "a/b/c", str(tmp_path)):
        assert not is_hub_source(source)
    assert hub_split("owner/name:test", "train") == ("owner/name", "test")
    assert hub_split("owner/name", "train") == ("owner/name", "train")


def test_columns_by_other_names_are_used(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines([{"question": f"q{n}", "answer": f"a{n}", "id": n} for n in range(20)]))
    data = DataSection(train=str(path), columns={"prompt": "question", "completion": "answer"})
    parts = read_parts(data)
    assert {one.completion for one in (*parts.train, *parts.validation, *parts.heldout)} == {f"a{n}" for n in range(20)}
    assert parts.unused_columns == ["id"]
    wrong = data.model_copy(update={"columns": {"prompt": "query"}})
    with pytest.raises(DataError, match=r"data\.columns names query; the columns are question, answer, id"):
        read_parts(wrong)


@pytest.mark.parametrize("kind", ["texts", "messages"])
def test_columns_that_are_not_read_are_named_wherever_they_stand(kind: str, tmp_path: Path) -> None:
    def said(role: str, text: str) -> Any:
        return text if kind == "texts" else [{"role": role, "content": text}]

    rows = [{"prompt": said("user", f"q{n}"), "completion": said("assistant", f"a{n}")} for n in range(20)]
    rows[5] |= {"context": "c"}
    rows[7] |= {"tools": [{"name": "f"}], "system": "s"}
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    parts = read_parts(DataSection(train=str(tmp_path / "rows.jsonl")))
    assert parts.unused_columns == {"texts": ["context", "tools", "system"], "messages": ["context"]}[kind]


def test_nulls_of_unified_columns_are_no_values(tmp_path: Path) -> None:
    calls = [{"function": {"name": f"f{n}", "arguments": {f"key{n}": "x"}}} for n in range(2)]
    asked = {"role": "user", "content": "q"}
    path = tmp_path / "rows.parquet"
    rows = [{"messages": [asked, {"role": "assistant", "content": None, "tool_calls": [call]}]} for call in calls]
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    stored = read_file(str(path))
    # Arrow gives each struct the keys of all rows
    assert stored[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"key0": "x", "key1": None}
    first, second = to_examples(stored, "messages", source="x")
    assert isinstance(first, Conversation) and isinstance(second, Conversation)
    assert first.messages[0] == asked
    assert first.messages[1]["tool_calls"][0]["function"]["arguments"] == {"key0": "x"}
    assert second.messages[1]["tool_calls"][0]["function"]["arguments"] == {"key1": "x"}


def test_odd_rows_are_counted(tmp_path: Path, tiny_model: Path) -> None:
    path, other, third = (tmp_path / f"{name}.jsonl" for name in ("rows", "other", "third"))
    rows = [*ROWS, *ROWS[:2], {"prompt": "long", "completion": "x" * 200}, {"prompt": "empty", "completion": ""}]
    path.write_text(lines(rows), encoding="utf-8")
    other.write_text(lines([{"prompt": "other", "completion": "x"}]))
    third.write_text(lines([{"prompt": "third", "completion": "x"}]))
    data = DataSection(train=str(path), validation=str(other), heldout=str(third), max_length=64)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prepared = prepare_data(data, tokenizer, tmp_path)
    train = prepared.summaries["train"]
    assert (train.n_repeated, train.n_cut_answers, train.n_empty_answers) == (2, 1, 1)
    assert "warning: train: 1 of 24 rows lose the end of an answer to data.max_length" in prepared.notes()
    path.write_text(lines([{**row, "completion": ""} for row in ROWS]), encoding="utf-8")
    with pytest.raises(DataError, match="train: every answer is empty"):
        prepare_data(data, tokenizer, tmp_path)
