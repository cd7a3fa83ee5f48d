"""Measures how well a search forecasts its end: what it says of the time left, against what was left.

Run as `python benchmarks/time_left.py OUTPUT.json SPACE.yaml [--section.key value ...]`, with nothing else running. It
runs the search into a temporary folder and reads `activity.json` once a second, as `raylora status` does.
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

from raylora.run.activity import read_activity
from raylora.run.directory import RunDirectory
from raylora.run.events import Finished, Stopped, read_events

FRACTIONS = (1 / 3, 0.5, 0.75, 0.9)
"""Shares of the search's time at which the forecast is compared."""


def main() -> None:
    output, space, *settings = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / "run")
        began, said = time.time(), []
        command = [sys.executable, "-m", "raylora.search", space, "--output", str(run.path), "--quiet", *settings]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and not run.best_adapter.is_dir():  # the merge comes after
            activity = read_activity(run.activity_file)
            if activity is not None and activity.facts.get("seconds_left") is not None:
                said.append((activity.time, activity.facts["seconds_left"], activity.done, activity.total))
            time.sleep(1)
        process.terminate()
        process.wait()
        events = list(read_events(run.events_file))
    end = max(event.time for event in events if isinstance(event, Finished | Stopped))
    began = events[0].time
    rows = []
    for fraction in FRACTIONS:
        now = began + fraction * (end - began)
        at, seconds_left, done, total = min(said, key=lambda one: abs(one[0] - now))
        rows.append(
            {
                "share_of_time": round((at - began) / (end - began), 3),
                "said_seconds": round(seconds_left, 1),
                "true_seconds": round(end - at, 1),
                "off": round(seconds_left / (end - at) - 1, 3),
                "steps": f"{done} of {total}",
            }
        )
        print(rows[-1])
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "space": space,
        "settings": settings,
        "search_seconds": round(end - began, 1),
        "forecasts": rows,
    }
    Path(output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
