"""Writes the demo's data: requests to a smart home in plain words, and the command each stands for.

Run as `python examples/make_requests.py examples/requests.jsonl`. The rows are this project's own work (Apache-2.0).
"""

import json
import random
import sys
from pathlib import Path

ROOMS = ["kitchen", "bedroom", "bathroom", "hall", "garage", "attic", "office", "nursery", "cellar", "living room"]
DEVICES = {
    "light": ["lights", "lamp", "light"],
    "heater": ["heater", "heating", "radiator"],
    "fan": ["fan", "ventilator"],
    "blinds": ["blinds", "shutters"],
    "speaker": ["speaker", "music"],
    "camera": ["camera", "security cam"],
}
STATES = {
    "on": [
        "turn on the {d} in the {r}",
        "switch the {r} {d} on",
        "{r} {d} on please",
        "could you start the {d} in the {r}",
    ],
    "off": [
        "turn off the {d} in the {r}",
        "switch the {r} {d} off",
        "no more {d} in the {r}",
        "please stop the {r} {d}",
    ],
    "low": ["dim the {d} in the {r}", "set the {r} {d} to low", "less {d} in the {r} please"],
    "high": ["turn the {r} {d} up", "set the {d} in the {r} to high", "more {d} in the {r} please"],
}
HOURS = ["twelve", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]


def when(rng: random.Random) -> tuple[str, str]:
    """A time in words and as H:MM am or pm, or nothing and `now`."""
    if rng.random() < 0.3:
        return "", "now"
    hour, half, evening = rng.randrange(12), rng.random() < 0.3, rng.random() < 0.5
    suffix = "pm" if evening else "am"
    clock = f"{hour or 12}:{30 if half else 0:02d} {suffix}"
    words = [f" at {hour or 12}{':30' if half else ''} {suffix}"]
    if half:
        words.append(f" at half past {HOURS[hour]} {suffix}")
    else:
        words.append(f" at {HOURS[hour]} {suffix}")
    return rng.choice(words), clock


def make_row(rng: random.Random) -> dict[str, str]:
    """One request with its command."""
    device, state, room = rng.choice(list(DEVICES)), rng.choice(list(STATES)), rng.choice(ROOMS)
    words, clock = when(rng)
    request = rng.choice(STATES[state]).format(d=rng.choice(DEVICES[device]), r=room) + words
    return {"prompt": f"Request: {request}\nCommand:", "completion": f" {device} {state} | {room} | {clock}"}


def make_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` rows, no two prompts alike."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < n:
        row = make_row(rng)
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in make_rows(800)), encoding="utf-8")
