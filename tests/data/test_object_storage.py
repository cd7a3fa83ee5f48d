"""Rows are read from real servers of object storage, and what goes wrong there is one sentence."""

from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from raylora.config.schema import SearchConfig
from raylora.data.read import read_rows
from raylora.errors import DataError
from raylora.run.directory import RunDirectory
from raylora.search.plan import Devices, make_plan
from tests.storage_servers import AZURE, S3, Provider, each_provider

__all__ = ["each_provider"]  # the fixture


def test_rows_are_read_from_a_file_and_by_a_pattern(bucket: str, provider: Provider) -> None:
    fs = fsspec.filesystem(provider.scheme)
    for name, text in (("a", "one"), ("b", "two")):
        fs.pipe_file(f"{bucket}/data/{name}.jsonl", f'{{"text": "{text}"}}\n'.encode())
    assert list(read_rows(f"{bucket}/data/a.jsonl").values()) == [{1: {"text": "one"}}]
    texts = [row["text"] for rows in read_rows(f"{bucket}/data/*.jsonl").values() for row in rows.values()]
    assert texts == ["one", "two"]


def test_files_that_are_not_there_are_named(bucket: str) -> None:
    with pytest.raises(DataError, match=r"data file not found: \w+://.*/none\.jsonl"):
        read_rows(f"{bucket}/none.jsonl")
    with pytest.raises(DataError, match=r"data file not found: \w+://.*/none-\*\.jsonl"):
        read_rows(f"{bucket}/none-*.jsonl")


@pytest.mark.parametrize("provider", [S3, AZURE], ids=["S3", "Azure"], indirect=True)
def test_missing_credentials_are_named(bucket: str, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in provider.credentials:
        monkeypatch.delenv(name)
    fsspec.get_filesystem_class(provider.scheme).clear_instance_cache()
    for source in (f"{bucket}/rows.jsonl", f"{bucket}/*.jsonl"):
        with pytest.raises(DataError, match=r"jsonl: no credentials for it \(.*credentials"):
            read_rows(source)


@pytest.mark.parametrize("provider", [AZURE], ids=["Azure"], indirect=True)
def test_the_account_in_a_url_is_kept_by_its_files(bucket: str) -> None:
    for name in ("a", "b"):
        fsspec.filesystem("abfs").pipe_file(f"{bucket}/data/{name}.jsonl", b'{"text": "one"}\n')
    folder = f"{bucket}@devstoreaccount1.dfs.core.windows.net/data"
    assert list(read_rows(f"{folder}/*.jsonl")) == [f"{folder}/a.jsonl", f"{folder}/b.jsonl"]
    assert list(read_rows(f"{folder}/a.jsonl").values()) == [{1: {"text": "one"}}]


def test_a_search_plans_with_rows_from_there(
    bucket: str, provider: Provider, rows_file: Path, make_config: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    fsspec.filesystem(provider.scheme).put_file(str(rows_file), f"{bucket}/rows.jsonl")
    here, there = (
        make_plan(make_config(data={"train": source}), RunDirectory(tmp_path / "run"), Devices(0, 1, "here", 1))
        for source in (str(rows_file), f"{bucket}/rows.jsonl")
    )
    assert there.data.summaries == here.data.summaries
