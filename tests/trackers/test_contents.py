"""Nothing secret leaves the machine."""

from collections.abc import Callable
from pathlib import Path

import pytest

from raylora.config.schema import SearchConfig
from raylora.run.directory import RunDirectory
from raylora.trackers.contents import scores_of, search_params, without_secrets, write_files
from tests.trackers.conftest import FACTS, write_scores

VERSIONS = {"raylora": "1", "git_commit": None, "packages": {"torch": "2"}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("of s3://key:secret@host/a.jsonl, twice", "of s3://...@host/a.jsonl, twice"),
        ("|https://host/a?X-Amz-Signature=1&b=2|next|", "|https://host/a?...|next|"),
        ("is it 3? or a@b.c", "is it 3? or a@b.c"),
    ],
)
def test_addresses_lose_users_and_queries(text: str, expected: str) -> None:
    assert without_secrets(text) == expected


def test_settings_hold_no_path_no_address_and_no_command(make_config: Callable[..., SearchConfig]) -> None:
    config = make_config(data={"train": "https://me:secret@example.com/rows.jsonl"})
    provenance = {**FACTS, **VERSIONS, "command": "raylora search --data.train https://me:secret@example.com"}
    params = search_params(config, provenance)
    assert "secret" not in str(params) and "example.com" not in str(params) and "/" not in params["base_model"]
    assert config.cache_dir is not None and config.cache_dir not in str(params)
    assert params["space/lora_alpha"] == 8
    assert params["data/train_rows"] == 100


def test_a_hub_name_is_shown_whole(make_config: Callable[..., SearchConfig]) -> None:
    config = make_config(base_model={"name": "owner/model"})
    assert search_params(config, {**FACTS, **VERSIONS})["base_model"] == "owner/model"


def test_scores_are_flat_and_files_are_cleaned(run: RunDirectory, tmp_path: Path) -> None:
    assert scores_of(run) == {}
    write_scores(run)
    assert scores_of(run) == {
        "merge/adapter/eval_loss": 1.5,
        "merge/adapter/kl_to_adapter": 0.0,
        "merge/written_nf4/eval_loss": 1.5625,
        "merge/loss_increase": 0.0,
        "merge/passed": 1.0,
        "heldout/adapter/bleu": 50.0,
    }
    (file,) = write_files(run, tmp_path)
    assert file.read_text() == "# data https://...@example.com/rows.jsonl?...\n"
