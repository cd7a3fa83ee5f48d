"""The command as a user types it: end to end, interrupted and resumed, on two nodes, with bad input."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
import ray
import torch
from peft import PeftModel
from ray.cluster_utils import Cluster
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from raylora.cli.app import app
from raylora.config.load import dump_config
from raylora.config.schema import SearchConfig
from raylora.run.atomic import read_json
from raylora.run.directory import RunDirectory
from raylora.run.events import read_events
from raylora.run.lock import locked
from raylora.run.state import SearchState

SPACE = {
    "r": {"choice": [2, 4]},
    "lora_alpha": {"choice": [1, 2], "times": "r"},
    "lora_dropout": 0.0,
    "learning_rate": {"loguniform": [1e-4, 1e-2]},
}


# a merge in a moment, whatever a model of random weights loses by it, and answers of one token
QUICK_END = ("--merge.formats", "[nf4]", "--merge.strategy", "stochastic", "--merge.tolerance", 1)
QUICK_END += ("--evaluation.max_new_tokens", 1)
"""Settings of tests that ask about the search alone."""

# steps enough that a search can be caught in the middle
MANY_STEPS = ("--search.n_trials", 6, "--search.scheduler", "none", "--training.max_steps", 150)
MANY_STEPS += ("--search.trials_per_gpu", 2, *QUICK_END)


@pytest.fixture
def space_file(make_config: Callable[..., SearchConfig], tmp_path: Path) -> Path:
    config = make_config(
        space=SPACE,
        evaluation={"max_new_tokens": 4, "n_samples": 2},
        merge={"formats": ["nf4", "bf16", "residual"]},
    )
    path = tmp_path / "space.yaml"
    path.write_text(dump_config(config))
    return path


def command(*arguments: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "raylora.search", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: int = 480) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def trials_of(run: RunDirectory) -> list[dict]:
    """Table of trials without what differs between two runs of one search: times, speed and memory."""
    measured = ("seconds", "_at", "peak_memory_mib", "tokens_per_second")
    rows = pyarrow.parquet.read_table(run.trials_file).to_pylist()
    return [{key: row[key] for key in row if not key.endswith(measured)} for row in rows]


@pytest.mark.ray
def test_one_command_goes_from_rows_to_a_checked_merged_model(
    space_file: Path, tmp_path: Path, tiny_model: Path
) -> None:
    run = RunDirectory(tmp_path / "run")
    code, output = finish(command(space_file, "--output", run.path, "--search.n_trials", 9, "--search.grace_period", 3))
    assert code == 0, output
    state = SearchState.load(run)
    assert len(state.trials) == 9
    assert state.count("running") == 0
    best = state.best()
    assert best is not None
    assert f"best: trial {best.number}" in output
    assert "Traceback" not in output
    warnings = [line for line in output.splitlines() if "warn" in line.lower()]
    assert warnings == ["warning: 8 validation rows are few: their mean loss may rank trials by chance"]
    # the adapter loads with peft alone
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(run.best_adapter))
    assert adapter.peft_config["default"].r == best.r
    assert adapter.peft_config["default"].base_model_name_or_path == str(tiny_model)
    # the merged model loads with transformers alone, as 4-bit
    merged = AutoModelForCausalLM.from_pretrained(run.merged("nf4"))
    assert merged.config.quantization_config.bnb_4bit_quant_type == "nf4"
    plain = AutoModelForCausalLM.from_pretrained(run.merged("bf16"))
    assert plain.dtype == torch.bfloat16
    assert not hasattr(plain.config, "quantization_config")
    merge = read_json(run.merge_file)
    assert merge["models"]["adapter"]["eval_loss"] == pytest.approx(best.eval_loss, rel=1e-5)  # float32's rounding
    assert merge["forms"]["nf4"]["eval_loss"] == merge["models"][merge["strategy"]]["eval_loss"]
    assert merge["passed"]
    models = read_json(run.evaluation_file)["models"]
    assert set(models) == {"base", "adapter", "merged_nf4", "merged_bf16", "merged_residual"}
    assert all("exact_match" in scores for scores in models.values())
    report = run.report_file.read_text()
    for part in ("Best trial", "Held-out check", "Merge", "Rank against loss", "Trials", "Data", "Provenance"):
        assert f"## {part}" in report
    assert f"python -m raylora.search {space_file} --output {run.path}" in run.provenance()["command"]
    # the resolved config is a search space file itself, and gives the same search to the last digit
    again = RunDirectory(tmp_path / "again")
    code, output = finish(command(run.config_file, "--output", again.path, *QUICK_END))
    assert code == 0, output
    assert trials_of(again) == trials_of(run)
    # each later step runs alone, though the run directory has moved and the cache is gone
    run = RunDirectory(run.path.rename(tmp_path / "elsewhere"))
    shutil.rmtree(tmp_path / "cache")
    for module in ("merge", "evaluate", "report"):
        result = subprocess.run(
            [sys.executable, "-m", f"raylora.{module}", str(run.path)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert "merged_nf4" in result.stdout
    exported = CliRunner().invoke(app, ["export", str(run.path), "--format", "bf16", "--output", str(tmp_path / "out")])
    assert exported.exit_code == 0, exported.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("pipeline_tag: text-generation", "## Load", "merged_nf4, reloaded", "exact_match", "Data fingerprint"):
        assert part in card


def end(how: signal.Signals, space_file: Path, run: RunDirectory) -> tuple[int, str]:
    """Start a search, and end it when two of its six trials have finished."""
    process = command(space_file, "--output", run.path, *MANY_STEPS)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        if SearchState.load(run).count("finished") >= 2:
            break
        time.sleep(0.1)
    process.send_signal(how)
    code, output = finish(process, timeout=60)
    assert 2 <= SearchState.load(run).count("finished") < 6, output
    return code, output


@pytest.mark.ray
def test_an_interrupted_search_says_how_to_go_on(space_file: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    code, output = end(signal.SIGINT, space_file, run)
    assert code == 130, output
    assert f"--output {run.path} --resume" in output
    assert "Traceback" not in output
    assert [type(event).__name__ for event in read_events(run.events_file)][-1] == "Interrupted"
    refused, message = finish(command(space_file, "--output", run.path, *MANY_STEPS))
    assert refused == 2
    assert "is not empty; `--resume` goes on with it" in message.replace("\n", " ")


@pytest.mark.ray
def test_a_killed_search_is_resumed_though_it_was_moved_and_its_cache_is_gone(space_file: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    end(signal.SIGKILL, space_file, run)
    before = SearchState.load(run)
    moved = RunDirectory(run.path.rename(tmp_path / "elsewhere"))
    shutil.rmtree(tmp_path / "cache")
    code, output = finish(command(space_file, "--output", moved.path, *MANY_STEPS, "--resume"))
    assert code == 0, output
    after = SearchState.load(moved)
    assert len(after.trials) == after.count("finished") == 6
    for number in before.numbers("finished"):
        assert after.trials[number] == before.trials[number]


def test_a_dry_run_shows_the_plan_and_leaves_nothing_that_stands_in_the_way(space_file: Path, tmp_path: Path) -> None:
    for _ in range(2):
        done = CliRunner().invoke(app, ["search", str(space_file), "--output", str(tmp_path / "run"), "--dry-run"])
        assert done.exit_code == 0, done.output
        assert "trials    3 of at most 9 steps" in done.output
        assert "dry run: nothing was started" in done.output


def test_a_second_search_on_one_run_directory_is_refused(space_file: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        for arguments in ((), ("--resume",)):
            code, output = finish(command(space_file, "--output", tmp_path / "run", *arguments))
            assert code == 2
            assert f"is in use by process {os.getpid()} on" in output.replace("\n", " ")


@pytest.mark.ray
def test_a_search_uses_both_nodes_of_a_cluster(space_file: Path, tmp_path: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        run = RunDirectory(tmp_path / "run")
        process = command(
            space_file,
            "--output",
            run.path,
            "--search.lanes",
            2,
            "--search.n_trials",
            6,
            "--search.scheduler",
            "none",
            "--training.max_steps",
            400,  # the first lane must not be done before the second is up
            "--device",
            "cpu",  # a cluster without GPUs is not taken for one that trains on CPUs
            *QUICK_END,
            RAY_ADDRESS=cluster.address,
        )
        code, output = finish(process)
        assert code == 0, output
        trials = SearchState.load(run).trials.values()
        assert {trial.lane for trial in trials} == {"0", "1"}
        assert all(trial.state == "finished" for trial in trials)
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training.max_stps", "3"], "training.max_stps: unknown key; did you mean max_steps?"),
        (["--training.target_modules", "query"], "target_modules: no module is named query; the model has down_proj"),
        (["--base_model.name", "nowhere"], "base model not found: nowhere"),
        (["--data.train", "none.jsonl"], "data file not found: none.jsonl"),
        (["--device", "cuda"], "device is cuda, and this machine has no GPU"),
        (["--search.lanes", "99"], "search.lanes must be at most the"),
        (["--resume"], "nothing to resume"),
        (["stray"], "unexpected argument stray"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    arguments: list[str], message: str, space_file: Path, tmp_path: Path
) -> None:
    if "cuda" in arguments and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    done = CliRunner().invoke(app, ["search", str(space_file), "--output", str(tmp_path / "run"), *arguments])
    assert done.exit_code == 2
    assert message in done.output
    assert isinstance(done.exception, SystemExit)
    assert not (tmp_path / "run" / "config.yaml").exists()
