"""Names the files of a run directory, which holds one search, and opens or reopens it.

A run directory may lie in object storage. `RunDirectory.path` is then this machine's working copy of it.
"""

import difflib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from raylora.config.load import parse_config
from raylora.config.schema import SearchConfig
from raylora.errors import RunDirectoryError
from raylora.run.atomic import read_json
from raylora.run.lock import LOCK
from raylora.run.parts import pull_events
from raylora.run.storage import Storage
from raylora.run.transfer import OWNER, clear, pull_files, pull_folder, push_checkpoint


@dataclass(frozen=True)
class RunDirectory:
    """Files of one search, described in results/README.md. Every step reads and writes only here."""

    path: Path
    remote: str | None = None
    """URL of the run directory in object storage, of which `path` is a working copy; None if `path` is all."""

    @property
    def location(self) -> str:
        """Path or URL by which the user knows it."""
        return self.remote or str(self.path)

    @property
    def storage(self) -> Storage | None:
        """Object storage that holds it; None for a folder."""
        return Storage(self.remote) if self.remote else None

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def provenance_file(self) -> Path:
        return self.path / "provenance.json"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def study_file(self) -> Path:
        return self.path / "study.db"

    @property
    def trials_file(self) -> Path:
        return self.path / "trials.parquet"

    @property
    def history_file(self) -> Path:
        return self.path / "history.parquet"

    @property
    def lanes_file(self) -> Path:
        return self.path / "lanes.json"

    @property
    def best_adapter(self) -> Path:
        return self.path / "best_adapter"

    @property
    def merge_file(self) -> Path:
        return self.path / "merge.json"

    @property
    def evaluation_file(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def answers_file(self) -> Path:
        return self.path / "answers.jsonl"

    @property
    def report_file(self) -> Path:
        return self.path / "report.md"

    @property
    def activity_file(self) -> Path:
        """Activity of the process that works here; the file is there while it works."""
        return self.path / "activity.json"

    @property
    def page_file(self) -> Path:
        return self.path / "report.html"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def merged(self, form: str) -> Path:
        """Return the model directory of one merge format, such as `nf4`."""
        return self.path / f"merged_{form}"

    def trial(self, number: int) -> Path:
        """Return the folder of one trial's checkpoints."""
        return self.path / "trials" / f"{number:04d}"

    def cache(self, config: SearchConfig) -> Path:
        """Return the folder of tokens and quantized bases, shared by the runs beside this one."""
        if config.cache_dir:
            return Path(config.cache_dir).expanduser().resolve()
        return self.path.parent / ".cache" if self.remote is None else _local_cache()

    def push_checkpoint(self, name: str) -> None:
        """Upload a checkpoint to object storage, and remove those of its trial that are gone here.

        Args:
            name: of the checkpoint, relative to the run directory.

        Raises:
            RunDirectoryError: storage does not take it.
        """
        if self.storage is not None:
            push_checkpoint(self.storage.patient(), self.path, name)

    def pull_checkpoint(self, name: str) -> None:
        """Download a checkpoint from object storage, unless this machine has it.

        Raises:
            RunDirectoryError: it is not there, or storage cannot be reached.
        """
        if self.storage is not None:
            pull_folder(self.storage.patient(), self.path, name)

    def config(self) -> SearchConfig:
        """Return the resolved settings that the run was started with.

        Raises:
            RunDirectoryError: this is no run directory.
        """
        if not self.config_file.is_file():
            raise RunDirectoryError(f"{self.location} is no run directory: it holds no {self.config_file.name}")
        return parse_config(self.config_file.read_text(encoding="utf-8"), source=str(self.config_file))

    def provenance(self) -> dict[str, Any]:
        """Return what `write_provenance` wrote at the start.

        Raises:
            RunDirectoryError: it is not there.
        """
        if not self.provenance_file.is_file():
            raise RunDirectoryError(f"{self.location} holds no {self.provenance_file.name}: its search has not started")
        return read_json(self.provenance_file)


def run_at(place: Path | str) -> RunDirectory:
    """Return the run directory at a path or URL. Nothing is read or written."""
    if (url := url_of(place)) is None:
        return RunDirectory(Path(place).expanduser().resolve())
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return RunDirectory(_local_cache() / "runs" / digest / url.rpartition("/")[2], url)


def url_of(place: Path | str) -> str | None:
    """Return a place as a URL without a slash at its end; None if it is a path."""
    found = re.match("([a-z][a-z0-9+]+):/+(.*?)/*$", str(place))  # pathlib makes one slash of two
    return f"{found[1]}://{found[2]}" if found else None


def open_run(path: Path, config: SearchConfig, *, resume: bool) -> RunDirectory:
    """Return a new run directory, or the one to go on with. Nothing is written yet but a working copy.

    Args:
        path: folder, or URL of object storage.
        config: settings of the search.
        resume: go on with the search that is there.

    Raises:
        RunDirectoryError: it is not empty without `resume`, is missing with it, or was started with another config; or
            storage cannot be reached, or refuses.
    """
    run = run_at(path)
    if not resume:
        if _is_used(run):
            raise RunDirectoryError(
                f"{run.location} is not empty; `--resume` goes on with it, `--output DIR` starts another"
            )
        if run.remote is not None:
            pull(run)  # clears what a run that was removed there has left here
        return run
    if not (_is_used(run) if run.remote else run.path.is_dir()):
        raise RunDirectoryError(f"nothing to resume: {run.location} does not exist")
    pull(run)
    if not run.config_file.is_file():
        others = [path.name for path in run.path.iterdir() if path.name[0] != "." and path.name != run.logs.name]
        if others and run.remote is None:
            raise RunDirectoryError(f"nothing to resume: {run.location} holds no search, but {min(others)}")
        return run  # killed before the config was on disk: there is nothing to contradict
    before, now = _comparable(run.config()), _comparable(with_pinned_commits(config, run))
    if before != now:
        changed = [line for line in difflib.ndiff(before, now) if line[0] in "+-"]
        raise RunDirectoryError(
            f"{run.location} was started with another config; resume with the same one, or start another directory. "
            f"Changed (- then, + now): {'; '.join(' '.join(line.split()) for line in changed[:6])}"
        )
    return run


def existing_run(path: Path, *, folders: bool = False) -> RunDirectory:
    """Return the run directory of a search that was started, with its files here.

    Args:
        path: folder, or URL of object storage.
        folders: download adapter and merged models too.

    Raises:
        RunDirectoryError: there is none; or storage cannot be reached, or refuses.
    """
    run = run_at(path)
    pull(run, folders=folders)
    run.config()
    return run


def pull(run: RunDirectory, *, folders: bool = False) -> None:
    """Bring the working copy of a run in object storage up to date; a folder is left as it is.

    A working copy that a process here holds is newer than what is in storage, and stays. One of another search, which
    was at the same URL before, is emptied first.

    Args:
        run: the run directory.
        folders: include adapter and merged models. Checkpoints are downloaded where they are needed.

    Raises:
        RunDirectoryError: storage cannot be reached, or refuses.
    """
    storage = run.storage
    if storage is None:
        return
    storage.list("events")  # says what is wrong before anything is written here
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run.path / LOCK, timeout=0):
            if run.provenance_file.is_file() and _started(storage) != run.provenance()["started"]:
                clear(run.path)
            pull_files(storage, run.path, folders=folders)
            pull_events(storage, run.events_file)
    except Timeout:
        return


def _started(storage: Storage) -> str | None:
    """Return when the search in storage was started; None if it was not."""
    try:
        return str(json.loads(storage.read("provenance.json"))["started"])
    except FileNotFoundError:
        return None


def _is_used(run: RunDirectory) -> bool:
    """Return True if a run directory holds anything."""
    if run.storage is not None:
        return bool(run.storage.list(below=False).keys() - {OWNER} or run.storage.list("events"))
    return run.path.is_dir() and any(not file.name.startswith(".") for file in run.path.iterdir())


def _local_cache() -> Path:
    """Return this machine's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "raylora"


def with_pinned_commits(config: SearchConfig, run: RunDirectory) -> SearchConfig:
    """Return settings with the Hub commits that a run was started with, where they name none themselves."""
    if not run.config_file.is_file():
        return config
    then = run.config()
    base, data = config.base_model, config.data
    return config.model_copy(
        update={
            "base_model": base.model_copy(update={"revision": base.revision or then.base_model.revision}),
            "data": data.model_copy(update={"revision": data.revision or then.data.revision}),
        }
    )


def check_same_data(run: RunDirectory, fingerprint: str) -> None:
    """Check that a run goes on with the rows it was started with: losses on others are not comparable.

    Raises:
        RunDirectoryError: rows, tokenizer or a setting that shapes tokens have changed since.
    """
    before = run.provenance()["data_fingerprint"] if run.provenance_file.is_file() else fingerprint
    if before != fingerprint:
        raise RunDirectoryError(
            f"{run.location} was started with other data (fingerprint {before}, now {fingerprint}); "
            "resume with the same rows, or start another directory"
        )


def _comparable(config: SearchConfig) -> list[str]:
    """Return the settings that must not change within a run; the number of trials and where they train may."""
    values = config.model_dump(mode="json")
    for key in (
        "n_trials",
        "lanes",
        "trials_per_gpu",
        "tokens_per_pass",
        "time_budget_minutes",
        "repeat_best",
        "repeats",
    ):
        values["search"].pop(key)
    for key in ("evaluation", "merge", "report_to", "cache_dir", "device"):
        values.pop(key)
    return yaml.safe_dump(values, sort_keys=False).splitlines()
