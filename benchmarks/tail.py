"""Measures what comes after the search: merge, held-out check and report, against the time of the search itself.

Run as `python benchmarks/tail.py OUTPUT.json SPACE.yaml [--section.key value ...]`, with nothing else running. The
search starts with data and base in the cache, and runs into a temporary folder.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from raylora.run.directory import RunDirectory
from raylora.run.state import SearchState


def main() -> None:
    output, space, *settings = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / "run")
        cache = ["--cache_dir", f"{folder}/cache"]
        command = [sys.executable, "-m", "raylora.search", space, *settings, *cache, "--output"]
        # fills the cache, as an earlier search would have
        subprocess.run([*command, f"{folder}/dry", "--dry-run"], check=True, stdout=subprocess.DEVNULL)
        began = time.time()
        subprocess.run([*command, str(run.path), "--quiet"], check=True, stdout=subprocess.DEVNULL)
        ended = time.time()
        searched = max(trial.ended_at or 0.0 for trial in SearchState.load(run).trials.values())
        merged, evaluated = (file.stat().st_mtime for file in (run.merge_file, run.evaluation_file))
        merge = json.loads(run.merge_file.read_text(encoding="utf-8"))
        heldout = json.loads(run.evaluation_file.read_text(encoding="utf-8"))
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "space": space,
        "settings": settings,
        "search_seconds": round(searched - began, 1),
        "merge_seconds": round(merged - searched, 1),
        "of_which_rounding": {
            name: round(facts["seconds"], 1) for name, facts in merge["models"].items() if "seconds" in facts
        },
        "heldout_seconds": round(evaluated - merged, 1),
        "heldout_prompts": heldout["n_prompts"],
        "report_seconds": round(ended - evaluated, 1),
        "tail_over_search": round((ended - searched) / (searched - began), 3),
    }
    Path(output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
