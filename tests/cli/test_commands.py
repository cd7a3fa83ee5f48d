"""Override parsing, the doctor, the console script and a single trial."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from ray.exceptions import RayTaskError
from safetensors import SafetensorError
from typer.testing import CliRunner

from raylora import doctor
from raylora.cli.app import app
from raylora.cli.command import command, parse_overrides, split_arguments
from raylora.config.load import dump_config
from raylora.config.schema import SearchConfig
from raylora.errors import ConfigError
from raylora.machine import Limit


def test_both_forms_of_overrides_are_read() -> None:
    assert parse_overrides(["--a.b", "1", "--c=[1, 2]"]) == {"a.b": "1", "c": "[1, 2]"}
    assert parse_overrides(["--a", "-3"]) == {"a": "-3"}
    with pytest.raises(ConfigError, match="--a needs a value"):
        parse_overrides(["--a"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EROFS, os.strerror(errno.EROFS)),
        # as safetensors says it
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("is_of_a_task", [False, True])
def test_a_disk_that_takes_nothing_is_one_line(
    error: Exception, is_of_a_task: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise RayTaskError("merge_run", "a traceback\nof Ray", error).as_instanceof_cause() if is_of_a_task else error

    with pytest.raises(typer.Exit) as ended:
        command(fails)()
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_path_that_is_something_else_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").touch()
    for output in ("notes.txt", "notes.txt/run"):
        with pytest.raises(typer.Exit) as ended:
            command((tmp_path / output).mkdir)()
        assert ended.value.exit_code == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/notes.txt: file exists\nerror: {tmp_path}/notes.txt/run: not a directory\n"
    )


COMMANDS = ("search", "trial", "merge", "evaluate", "report", "compare", "export", "doctor", "init", "status")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_step_is_a_subcommand_with_help(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize(
    ("shell", "typed"),
    [
        ("bash", {"COMP_WORDS": "raylora s", "COMP_CWORD": "1"}),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "raylora s"}),
        ("fish", {"_TYPER_COMPLETE_ARGS": "raylora s", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_a_shell_completes_the_subcommands(shell: str, typed: dict[str, str]) -> None:
    # as the script that `raylora --install-completion` leaves for the shell asks
    asked = CliRunner().invoke(app, [], prog_name="raylora", env={"_RAYLORA_COMPLETE": f"complete_{shell}", **typed})
    assert asked.exit_code == 0
    assert {name for name in ("search", "status", "doctor", "init") if re.search(rf"\b{name}\b", asked.output)} == {
        "search",
        "status",
    }


def test_the_completion_script_is_that_of_the_console_script() -> None:
    script = CliRunner().invoke(app, ["--show-completion", "bash"], prog_name="raylora")
    assert script.exit_code == 0
    assert "_RAYLORA_COMPLETE=complete_bash" in script.output


def test_a_first_argument_may_be_left_out() -> None:
    assert split_arguments(Path("--a.b"), ["1", "--c", "2"]) == (None, {"a.b": "1", "c": "2"})
    assert split_arguments(Path("space.yaml"), ["--c", "2"]) == (Path("space.yaml"), {"c": "2"})


def test_a_trial_runs_without_ray(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(dump_config(make_config()))
    command = [
        sys.executable,
        "-m",
        "raylora.trial",
        tmp_path / "space.yaml",
        "--output",
        tmp_path / "run",
        "--space.r",
        "3",
    ]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "assignment: r=3" in result.stdout
    assert "RungMetrics(step=9" in result.stdout
    assert (tmp_path / "run" / "trials" / "0000" / "checkpoint-9" / "adapter_model.safetensors").is_file()


def test_a_trial_goes_on_from_a_checkpoint_that_is_there(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["trial", "smoke.yaml", "--resume-from", str(tmp_path / "none")])
    assert done.exit_code == 2
    assert "--resume-from names no checkpoint" in done.output


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for module in ("merge", "evaluate", "report", "export"):
        output = ["--output", str(tmp_path / "out")] if module == "export" else []
        result = subprocess.run(
            [sys.executable, "-m", f"raylora.{module}", str(tmp_path), *output],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2
        assert "is no run directory: it holds no config.yaml" in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.ray
def test_the_doctor_finds_this_machine_fit() -> None:
    result = subprocess.run([sys.executable, "-m", "raylora.doctor"], capture_output=True, text=True, check=False)
    assert "ok   bitsandbytes NF4 on" in result.stdout, result.stdout + result.stderr
    assert "starts and runs a task" in result.stdout


def test_the_doctor_says_how_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_GIB", 1e9)
    finding = doctor.check_disk()
    assert not finding.ok
    assert "GiB free" in finding.cure
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "torch sees no GPU" in doctor.check_gpu().text


def test_the_doctor_says_whose_limit_memory_and_cpus_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory_limit", lambda: Limit(3 * doctor.GIB, "/sys/fs/cgroup/memory.max"))
    monkeypatch.setattr(doctor, "free_memory", lambda: 2.5 * doctor.GIB)
    monkeypatch.setattr(doctor, "cpu_limit", lambda: Limit(1.5, "/sys/fs/cgroup/cpu.max"))
    assert doctor.check_limits().text == (
        "memory 3.0 GiB, of which 2.5 are free (by /sys/fs/cgroup/memory.max); CPUs 1.5 (by /sys/fs/cgroup/cpu.max)"
    )


def test_the_doctor_says_what_this_machine_trains_and_speaks_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_python,))
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert [finding["ok"] for finding in found["findings"]] == [True]
    trials = {size["base"]: size["trials"] for size in found["trainable"]}
    assert trials["0.1B"] > 1 and list(trials.values()) == sorted(trials.values(), reverse=True)
