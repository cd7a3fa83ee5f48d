"""The measurement for GPUs runs from end to end, on a tiny model."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"

STAGES = ("env", "check", "products", "exact", "speed_smollm2", "kernels", "article")
"""Stages that have code of their own."""


def test_each_stage_of_the_gpu_benchmark_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--dry", "--here", "--only", *STAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    notes = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {note["stage"] for note in notes} == set(STAGES)
    # in two dtypes, each with the model's own layers and with fused ones
    assert [note["passed"] for note in notes if "passed" in note] == 4 * [True]
    # float32 on a CPU: packed and TRL agree to rounding, and a trial does not see its company
    assert all(note["relative"] < 1e-4 for note in notes if "relative" in note)
    assert all(note["beside_nan_bit_equal"] for note in notes if "ranks" in note and note["stage"] == "exact")


def test_a_pack_that_is_too_large_does_not_end_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    gpu = importlib.import_module("gpu")
    sizes = iter([None, 1.0])

    def packed_seconds(*_: object, **__: object) -> tuple[float, float]:
        seconds = next(sizes, 1.0)
        if seconds is None:
            raise torch.OutOfMemoryError("made up")
        return seconds, 0.0

    monkeypatch.setattr(gpu, "packed_seconds", packed_seconds)
    monkeypatch.setattr(gpu, "trl_seconds", lambda *_: 2.0)
    gpu.speed(gpu.Bench(tmp_path, "speed_smollm2", dry=True), "smollm2", [(8, 512), (1, 512)], [512])
    notes = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    timed = [note for note in notes if "engine" in note]
    assert [note.get("error") for note in timed] == ["made up"] + 7 * [None]
    assert all(note["seconds"] for note in timed[1:])
