"""`raylora status` shows a search that another process runs, and one that has ended."""

from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from raylora.cli.app import app
from raylora.config.schema import SearchConfig
from raylora.run.activity import Activity, write_activity
from raylora.run.events import LaneUp
from raylora.run.lock import locked
from tests.helpers import SESSION, history_of
from tests.report.runs import make_run


def test_a_search_that_runs_is_shown_with_the_steps_of_its_lanes(
    make_config: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    events = [SESSION, LaneUp("0", 1, 4, {"device": "cpu"}), *history_of(0, {3: 4.0, 9: 1.5}, "finished")]
    run = make_run(tmp_path / "run", make_config(), [*events, *history_of(1, {})])
    run.page_file.touch()
    ended = CliRunner().invoke(app, ["status", str(run.path)])
    assert ended.exit_code == 0, ended.output
    assert "best 1.5000 (trial 0)" in ended.output
    assert f"nothing runs here now; trials under way go on by --resume; report: {run.page_file}" in ended.output
    pulse = {"steps": {1: 2}, "tokens_per_second": 640.0, "memory_mib": 1000.0}
    write_activity(run.activity_file, Activity("searching", 11, 18, facts={"pulses": {"0": pulse}}))
    with locked(run.path):
        running = CliRunner().invoke(app, ["status", str(run.path)])
    assert "lane 0 (cpu): 1 of 4 slots, 640 tokens/s, peak 1,000 MiB" in running.output
    assert "searching: 11 of 18" in running.output and "process" in running.output
    assert "2/9" in running.output  # the step of the running trial, which it has not reported


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert result.exit_code == 2 and "is no run directory" in result.output
