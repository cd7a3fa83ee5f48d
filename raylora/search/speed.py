"""Remembers how fast a base trained on a device, so that the next search can be forecast before it starts."""

from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from raylora.config.schema import BaseModelSection
from raylora.run.atomic import read_json, write_json
from raylora.run.state import SearchState


@dataclass(frozen=True)
class Speed:
    """Speed of one lane, as a search measured it."""

    tokens_per_second: float
    """Training tokens of all its trials."""

    seconds_per_report: float
    """Time to validate and save, for each validation token."""

    measured: str
    """Date, ISO 8601."""


def measured_speed(state: SearchState, validation_tokens: int) -> Speed | None:
    """Return the speed that a search has had; None if no trial has reported.

    Args:
        state: the search.
        validation_tokens: tokens of the validation rows.
    """
    tokens: dict[int, int] = {}
    for report in state.history:
        tokens[report.number] = report.tokens_seen
    reported = [row for row in state.trials.values() if row.train_seconds]
    if not reported:
        return None
    train = sum(row.train_seconds or 0.0 for row in reported)
    per_token = state.seconds_per_report() / max(1, validation_tokens)
    return Speed(sum(tokens.values()) / train, per_token, date.today().isoformat())


def remember_speed(cache_dir: Path, base: BaseModelSection, device: str, speed: Speed) -> None:
    """Keep a speed in the cache, beside those of other bases and devices."""
    speeds = _speeds(cache_dir)
    speeds[_key(base, device)] = asdict(speed)
    with suppress(OSError):
        write_json(cache_dir / "speeds.json", speeds)


def remembered_speed(cache_dir: Path, base: BaseModelSection, device: str) -> Speed | None:
    """Return the newest speed of a base on a device; None if there is none."""
    values = _speeds(cache_dir).get(_key(base, device))
    return Speed(**values) if values else None


def _speeds(cache_dir: Path) -> dict[str, dict]:
    """Return all speeds: base and device -> fields of `Speed`."""
    try:
        return read_json(cache_dir / "speeds.json")
    except (OSError, ValueError):
        return {}


def _key(base: BaseModelSection, device: str) -> str:
    """Return what a speed depends on."""
    return f"{base.name}, {base.quantization}, {device}"
