"""Times a lane's steps alone and beside another program, by priority and by how long OpenMP's threads spin.

Run as `python benchmarks/priority.py OUTPUT.json [--steps 12]`, with nothing else running, after `make model`.

Each figure is the time of so many steps of two trials of the demo, in a process of its own, on all cores. The other
program is a loop that keeps one core busy.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

SPIN = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    **{f"GOMP_SPINCOUNT={n}": {"GOMP_SPINCOUNT": str(n)} for n in (1_000, 2_000, 4_000, 10_000)},
}
"""Name -> environment. libgomp's default spins for 300,000 rounds, or 1,000 if more threads than cores run."""

LIMIT = 300.0
"""Seconds after which a run is given up."""


def child(steps: int) -> None:
    """Train two trials of the demo for so many steps and print the seconds."""
    import torch  # noqa: PLC0415  # the parent needs neither

    from raylora.base.locate import find_checkpoint, load_tokenizer  # noqa: PLC0415
    from raylora.config.load import load_config  # noqa: PLC0415
    from raylora.data.prepare import prepare_data  # noqa: PLC0415
    from raylora.quiet import quiet_libraries  # noqa: PLC0415
    from raylora.run.state import SearchState  # noqa: PLC0415
    from raylora.search.sampler import Sampler  # noqa: PLC0415
    from raylora.training.choose import load_packed  # noqa: PLC0415

    quiet_libraries()
    torch.set_num_threads(os.cpu_count() or 1)
    config = load_config("search_spaces/demo.yaml")
    cache = Path("results/.cache")
    tokenizer = load_tokenizer(config.base_model, find_checkpoint(config.base_model, cache))
    tokens = prepare_data(config.data, tokenizer, cache).tokens_dir
    engine = load_packed(config, tokens_dir=tokens, cache_dir=cache, device="cpu", slots=2)
    assignment, _ = Sampler(config, SearchState()).propose(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            trial = assignment.model_copy(update={"seed": number})
            engine.add(number, trial, rungs=[10**6], directory=Path(folder) / str(number))
        engine.step()
        began = time.perf_counter()
        for _ in range(steps):
            engine.step()
        print(time.perf_counter() - began)


def measure(steps: int, niceness: int, spin: dict[str, str], busy: bool) -> float | None:
    """Return the seconds of one run; None if it was given up."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    command = ["nice", "-n", str(niceness), sys.executable, __file__, "-", "--child", "--steps", str(steps)]
    try:
        done = subprocess.run(
            command, env={**os.environ, **spin}, capture_output=True, text=True, check=True, timeout=LIMIT
        )
        return float(done.stdout.split()[-1])
    except subprocess.TimeoutExpired:
        return None
    finally:
        if other is not None:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--child", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.steps)
        return
    rows = []
    for name, spin in SPIN.items():
        row = {"spin": name}
        for niceness in (0, 15) if name == "default" else (0,):
            for busy in (False, True):
                where = "beside one busy program" if busy else "alone"
                row[f"seconds at niceness {niceness}, {where}"] = measure(arguments.steps, niceness, spin, busy)
        rows.append(row)
        print(json.dumps(row), flush=True)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "steps": arguments.steps,
        "given up after": LIMIT,
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
