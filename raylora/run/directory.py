"""Names the files of a run directory, which holds one search, and opens or reopens it."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raylora.config.load import build_config
from raylora.config.schema import SearchConfig
from raylora.errors import RunDirectoryError
from raylora.run.atomic import read_json


@dataclass(frozen=True)
class RunDirectory:
    """Files of one search, described in results/README.md. Every step reads and writes only here."""

    path: Path

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
        return Path(config.cache_dir).expanduser().resolve() if config.cache_dir else self.path.parent / ".cache"

    def config(self) -> SearchConfig:
        """Return the resolved settings that the run was started with.

        Raises:
            RunDirectoryError: this is no run directory.
        """
        if not self.config_file.is_file():
            raise RunDirectoryError(f"{self.path} is no run directory: it holds no {self.config_file.name}")
        return build_config(yaml.safe_load(self.config_file.read_text(encoding="utf-8")), source=str(self.config_file))

    def provenance(self) -> dict[str, Any]:
        """Return what `write_provenance` wrote at the start."""
        return read_json(self.provenance_file)


def open_run(path: Path, config: SearchConfig, *, resume: bool) -> RunDirectory:
    """Return a new run directory, or the one to go on with. Nothing is written yet.

    Raises:
        RunDirectoryError: it is not empty without `resume`, is missing with it, or was started with another config.
    """
    run = RunDirectory(path.expanduser().resolve())
    if not resume:
        if run.path.is_dir() and any(not file.name.startswith(".") for file in run.path.iterdir()):
            raise RunDirectoryError(f"{path} is not empty; `--resume` goes on with it, `--output DIR` starts another")
        return run
    if not run.path.is_dir():
        raise RunDirectoryError(f"nothing to resume: {path} does not exist")
    if not run.config_file.is_file():
        return run  # killed before the config was on disk: there is nothing to contradict
    before, now = _comparable(run.config()), _comparable(with_pinned_commits(config, run))
    if before != now:
        changed = [line for line in difflib.ndiff(before, now) if line[0] in "+-"]
        raise RunDirectoryError(
            f"{path} was started with another config; resume with the same one, or start another directory. "
            f"Changed (- then, + now): {'; '.join(' '.join(line.split()) for line in changed[:6])}"
        )
    return run


def existing_run(path: Path) -> RunDirectory:
    """Return the run directory of a search that was started.

    Raises:
        RunDirectoryError: there is none.
    """
    run = RunDirectory(path.expanduser().resolve())
    run.config()
    return run


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
            f"{run.path} was started with other data (fingerprint {before}, now {fingerprint}); "
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
