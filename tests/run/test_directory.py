"""Starting and reopening a run directory."""

from collections.abc import Callable
from pathlib import Path

import pytest

from raylora.config.schema import SearchConfig
from raylora.errors import RunDirectoryError
from raylora.run.directory import RunDirectory, check_same_data, open_run, with_pinned_commits
from raylora.run.provenance import write_provenance


def test_a_used_directory_needs_resume(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").write_text("x")
    with pytest.raises(RunDirectoryError, match=r"run is not empty; `--resume` goes on with it, `--output DIR`"):
        open_run(tmp_path / "run", make_config(), resume=False)


def test_nothing_to_resume(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"nothing to resume: .* does not exist"):
        open_run(tmp_path / "none", make_config(), resume=True)
    (tmp_path / "foreign" / "trials").mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match=r"nothing to resume: .*foreign holds no search, but trials"):
        open_run(tmp_path / "foreign", make_config(), resume=True)
    (tmp_path / "killed" / "logs").mkdir(parents=True)  # before its config was on disk
    (tmp_path / "killed" / ".lock").touch()
    assert open_run(tmp_path / "killed", make_config(), resume=True)
    with pytest.raises(RunDirectoryError, match=r"killed holds no provenance\.json: its search has not started"):
        RunDirectory(tmp_path / "killed").provenance()


def test_resuming_with_another_config_names_the_change(
    make_config: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    config = make_config()
    write_provenance(open_run(tmp_path / "run", config, resume=False), config, {"seed": 0})
    assert open_run(tmp_path / "run", make_config(search={"n_trials": 50}), resume=True)  # more trials are welcome
    with pytest.raises(RunDirectoryError, match=r"was started with another config.*- max_steps: 9; \+ max_steps: 10"):
        open_run(tmp_path / "run", make_config(training={"max_steps": 10}), resume=True)


def test_resuming_keeps_the_commits_that_were_pinned(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", make_config(), resume=False)
    write_provenance(run, make_config(base_model={"revision": "abc"}, data={"revision": "def"}), {})
    found = with_pinned_commits(make_config(), open_run(run.path, make_config(), resume=True))
    assert (found.base_model.revision, found.data.revision) == ("abc", "def")
    with pytest.raises(RunDirectoryError, match=r"another config.*- revision: abc; \+ revision: xyz"):
        open_run(run.path, make_config(base_model={"revision": "xyz"}), resume=True)


def test_resuming_with_other_data_is_refused(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    config = make_config()
    run = open_run(tmp_path / "run", config, resume=False)
    check_same_data(run, "abc")  # nothing to contradict yet
    write_provenance(run, config, {"data_fingerprint": "abc"})
    check_same_data(run, "abc")
    with pytest.raises(RunDirectoryError, match=r"was started with other data \(fingerprint abc, now def\)"):
        check_same_data(run, "def")


def test_config_and_provenance_are_read_back(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    config = make_config()
    run = open_run(tmp_path / "run", config, resume=False)
    write_provenance(run, config, {"data_fingerprint": "abc"})
    assert run.config() == config
    provenance = run.provenance()
    assert provenance["data_fingerprint"] == "abc"
    assert {"ray", "torch", "peft", "bitsandbytes"} <= provenance["packages"].keys()


def test_texts_that_look_like_other_values_are_read_back_as_texts(
    make_config: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run")
    texts = {"date": "2024-02-30", "float": "2e-4", "boolean": "no", "null": "null", "comment": "#### (.+)"}
    config = make_config(data={"subset": "2024-07-26", "chat_template_kwargs": texts})
    write_provenance(run, config, {"seed": 0})
    assert run.config() == config


def test_a_folder_without_config_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"is no run directory: it holds no config\.yaml"):
        RunDirectory(tmp_path).config()
