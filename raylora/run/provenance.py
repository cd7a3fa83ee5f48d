"""Records what a run was started with: settings, versions, commits, data and devices."""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raylora.config.load import dump_config
from raylora.config.schema import SearchConfig
from raylora.run.atomic import write_json, write_text
from raylora.run.directory import RunDirectory

PACKAGES = ("ray", "torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "optuna", "pyarrow")


def write_provenance(run: RunDirectory, config: SearchConfig, facts: dict[str, Any]) -> None:
    """Write settings and provenance, before the first trial; a resumed run keeps the time of its first start.

    Args:
        run: receives `config.yaml` and `provenance.json`.
        config: resolved settings.
        facts: further entries: data fingerprint, rungs, devices.
    """
    run.logs.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    resumed = {"started": run.provenance()["started"], "resumed": now} if run.provenance_file.is_file() else {}
    write_text(
        run.config_file,
        f"# resolved config; `python -m raylora.search {run.config_file}` repeats it\n" + dump_config(config),
    )
    write_json(
        run.provenance_file,
        {
            "started": now,
            "command": _command(),
            "raylora": importlib.metadata.version("raylora"),
            "git_commit": _git_commit(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            **facts,
            **resumed,
        },
    )


def _command() -> str:
    """Return the command as one would type it again: a module by its name, a program without its folder."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]])


def _git_commit() -> str | None:
    """Return the commit of the raylora checkout, or None if it is an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
