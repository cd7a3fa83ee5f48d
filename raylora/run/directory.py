"""Names the files of one search's run directory, and starts or reopens it."""

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
    """Every step reads and writes only here; `results/README.md` says what each file holds."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def provenance_file(self) -> Path:
        return self.path / "provenance.json"

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
    def report_file(self) -> Path:
        return self.path / "report.md"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def merged(self, form: str) -> Path:
        """Model directory of one merge format, `nf4` or `bf16`."""
        return self.path / f"merged_{form}"

    def trial(self, number: int) -> Path:
        """Checkpoints of one trial."""
        return self.path / "trials" / f"{number:04d}"

    def cache(self, config: SearchConfig) -> Path:
        """Tokens and quantized bases, shared by the runs beside this one."""
        return Path(config.cache_dir).expanduser().resolve() if config.cache_dir else self.path.parent / ".cache"

    def config(self) -> SearchConfig:
        """The resolved config that the run was started with.

        Raises:
            RunDirectoryError: this is no run directory.
        """
        if not self.config_file.is_file():
            raise RunDirectoryError(f"{self.path} is no run directory: it holds no {self.config_file.name}")
        return build_config(yaml.safe_load(self.config_file.read_text(encoding="utf-8")), source=str(self.config_file))

    def provenance(self) -> dict[str, Any]:
        """What was written at the start; see `start`."""
        return read_json(self.provenance_file)


def open_run(path: Path, config: SearchConfig, *, resume: bool) -> RunDirectory:
    """A new run directory, or the one to go on with. Nothing is written yet.

    Raises:
        RunDirectoryError: it is not empty without `resume`, is missing with it, or was started with another config.
    """
    run = RunDirectory(path.expanduser().resolve())
    if not resume:
        if run.path.is_dir() and any(run.path.iterdir()):
            raise RunDirectoryError(f"{path} is not empty; `--resume` goes on with it, `--output DIR` starts another")
        return run
    if not run.path.is_dir():
        raise RunDirectoryError(f"nothing to resume: {path} does not exist")
    if not run.config_file.is_file():
        return run  # killed before the config was on disk: there is nothing to contradict
    before, now = _comparable(run.config()), _comparable(config)
    if before != now:
        changed = [line for line in difflib.ndiff(before, now) if line[0] in "+-"]
        raise RunDirectoryError(
            f"{path} was started with another config; resume with the same one, or start another directory. "
            f"Changed (- then, + now): {'; '.join(' '.join(line.split()) for line in changed[:6])}"
        )
    return run


def check_same_data(run: RunDirectory, fingerprint: str) -> None:
    """Losses on other rows are not comparable, so a run goes on with the rows it was started with.

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
    """Settings that must not change within a run; how many trials there are, and where they train, may."""
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
    for key in ("evaluation", "merge", "cache_dir", "device"):
        values.pop(key)
    return yaml.safe_dump(values, sort_keys=False).splitlines()
