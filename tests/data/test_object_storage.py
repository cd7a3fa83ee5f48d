"""Rows are read from a real S3 server, and what goes wrong there is one sentence."""

from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from raylora.config.schema import SearchConfig
from raylora.data.read import read_rows
from raylora.errors import DataError
from raylora.run.directory import RunDirectory
from raylora.search.plan import Devices, make_plan


def test_rows_are_read_from_a_file_and_by_a_pattern(bucket: str) -> None:
    fs = fsspec.filesystem("s3")
    for name, text in (("a", "one"), ("b", "two")):
        fs.pipe_file(f"{bucket}/data/{name}.jsonl", f'{{"text": "{text}"}}\n'.encode())
    assert list(read_rows(f"{bucket}/data/a.jsonl").values()) == [{1: {"text": "one"}}]
    texts = [row["text"] for rows in read_rows(f"{bucket}/data/*.jsonl").values() for row in rows.values()]
    assert texts == ["one", "two"]


def test_what_goes_wrong_is_said(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"data file not found: s3://.*/none\.jsonl"):
        read_rows(f"{bucket}/none.jsonl")
    with pytest.raises(DataError, match=r"data file not found: s3://.*/none-\*\.jsonl"):
        read_rows(f"{bucket}/none-*.jsonl")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fsspec.filesystem("s3").clear_instance_cache()
    for source in (f"{bucket}/rows.jsonl", f"{bucket}/*.jsonl"):
        with pytest.raises(DataError, match=r"jsonl: no credentials for it \(Unable to locate credentials\)"):
            read_rows(source)


def test_a_search_plans_with_rows_from_s3(
    bucket: str, rows_file: Path, make_config: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    fsspec.filesystem("s3").put_file(str(rows_file), f"{bucket}/rows.jsonl")
    here, there = (
        make_plan(make_config(data={"train": source}), RunDirectory(tmp_path / "run"), Devices(0, 1, "here", 1))
        for source in (str(rows_file), f"{bucket}/rows.jsonl")
    )
    assert there.data.summaries == here.data.summaries
