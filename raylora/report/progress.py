"""Shows a search as it goes on: a live view on a terminal; elsewhere plain lines, one every ten seconds at least."""

import time
from collections.abc import Mapping
from dataclasses import asdict

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raylora.config.schema import SearchConfig
from raylora.run.activity import Activity
from raylora.run.events import Event, Failed, Finished, LaneLost, LaneUp, Reported, Stopped
from raylora.run.state import ENDED, STATES, Lane, SearchState
from raylora.run.trial_row import TrialRow
from raylora.search.forecast import Forecaster, Sizes
from raylora.search.messages import Pulse

MAX_ROWS = 16
"""Trials in the live table: those that train, and the leaders."""

MAX_LANES = 8
"""Lanes that have a line each in the live view; more of them share one, so that the table stays on the screen."""

SEARCHING = "searching"
"""The activity while trials train."""

LINE_SECONDS = 10.0
"""Time between two plain lines on how far the search is."""


class Progress:
    """Use as a context manager around the search.

    Args:
        state: the search, which changes.
        config: settings of the search.
        rungs: optimizer steps at which trials are compared.
        console: shows it.
        logs: folder of logs, named where a lane is lost.
        sizes: as for `Forecaster`.
    """

    def __init__(
        self,
        state: SearchState,
        config: SearchConfig,
        rungs: list[int],
        console: Console,
        logs: str = "logs",
        sizes: Sizes | None = None,
    ) -> None:
        self._state, self._n_trials, self._console, self._logs = state, config.n_trials(), console, logs
        self._forecaster = Forecaster(config, rungs, sizes)
        self._pulses: Mapping[str, Pulse] = {}
        self._began, self._shown_at = time.time(), time.monotonic()
        self._live = (
            Live(console=console, refresh_per_second=1, get_renderable=self.view, redirect_stdout=False)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *args: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, event: Event) -> None:
        """Show one event, after it has changed the state."""
        match event:
            case LaneUp() if event.process > 1:
                self.note(f"lane {event.lane}: it is up again, on {event.facts.get('host', 'a node')}")
            case LaneUp() if event.facts.get("reason"):
                self.note(f"lane {event.lane} trains one trial at a time, with TRL: {event.facts['reason']}")
            case LaneUp() if event.facts.get("notes"):
                self.note(f"lane {event.lane}: {'; '.join(event.facts['notes'])}")
            case LaneLost():
                after = f"; its output is in {self._logs}" if event.for_good else "; its trials wait for a free slot"
                self.note(f"lane {event.lane}: {event.reason}{after}")
            case Reported() if not self._live:
                row = self._state.trials[event.number]
                self.note(f"trial {row.number}: step {row.step}/{row.max_steps}, eval_loss {row.eval_loss:.4f}")
            case Finished() | Stopped() | Failed() if not self._live:
                row = self._state.trials[event.number]
                self.note(f"trial {row.number}: {row.state}{_because(row)} ({_settings(row)}); {self.summary()}")

    def beat(self, pulses: Mapping[str, Pulse]) -> None:
        """Take in the newest pulse of each lane; without a terminal, say now and then how far the search is."""
        before, self._pulses = self._pulses, pulses
        if self._live:
            return
        for name, lane in self._state.lanes.items():
            pulse = pulses.get(name)
            if lane.up and pulse is not None and pulse.busy and not (name in before and before[name].busy):
                self.note(f"lane {name}: {pulse.busy}")
        if pulses != before and time.monotonic() - self._shown_at >= LINE_SECONDS:
            self.note(self.summary() if self._state.lanes else "; ".join(self._lanes()))

    def note(self, text: str) -> None:
        """Print a line that the user should see meanwhile."""
        self._console.print(text)
        self._shown_at = time.monotonic()

    def activity(self) -> Activity:
        """Return how far the search is, with the pulses of the lanes, for `activity.json`."""
        forecast = self._forecaster.forecast(self._state, time.time(), self._steps())
        pulses = {name: asdict(pulse) for name, pulse in self._pulses.items()}
        facts = {"seconds_left": forecast.seconds_left, "pulses": pulses}
        return Activity(SEARCHING, forecast.steps_done, forecast.steps_expected, facts=facts)

    def summary(self) -> str:
        """Return trials by state, the best loss, steps, time left and GPU-hours, in one line."""
        state = self._state
        counts = ", ".join(f"{state.count(name)} {name}" for name in reversed(STATES) if state.count(name))
        ended = sum(state.count(name) for name in ENDED)
        parts = [
            f"{ended}/{self._n_trials} trials: {counts}" if counts else f"{ended}/{self._n_trials} trials",
            _best(state),
        ]
        forecast = self._forecaster.forecast(state, time.time(), self._steps())
        if ended < self._n_trials or forecast.steps_left:
            parts.append(f"step {forecast.steps_done:,} of about {forecast.steps_expected:,}")
            parts.append(time_left(forecast.seconds_left))
        gpus = [lane.facts["ready_at"] for lane in state.lanes.values() if lane.facts.get("device", "cpu") != "cpu"]
        if gpus and state.numbers("running"):
            used = sum(time.time() - ready_at for ready_at in gpus) / 3600
            left = len(gpus) * (forecast.seconds_left or 0.0) / 3600
            parts.append(f"{used:.2f} GPU-hours of about {used + left:.2f}")
        return "; ".join(parts)

    def view(self) -> Group:
        """Return the live view: the search, its lanes, and the trials that train or lead."""
        parts = [Text(self.summary()), *(Text(line, style="dim") for line in self._lanes())]
        steps = self._steps()
        table = Table(box=None, pad_edge=False)
        for column in ("trial", "state", "", "step", "eval_loss", "r", "alpha", "dropout", "lr", "tokens/s"):
            table.add_column(column, justify="left" if column in ("state", "") else "right")
        best = self._state.best()
        styles = {"failed": "red", "stopped": "dim", "paused": "dim", "queued": "dim", "running": "cyan"}
        for row in self._rows():
            style = "bold green" if best and row.number == best.number else styles.get(row.state)
            step = steps.get(row.number, row.step)
            bar = ProgressBar(row.max_steps, step, width=12) if row.state == "running" else ""
            table.add_row(str(row.number), row.state, bar, *_cells(row, step), style=style)
        return Group(*parts, table)

    def _rows(self) -> list[TrialRow]:
        """Return the trials that train, and the leaders; then those that wait."""
        running = [self._state.trials[number] for number in sorted(self._state.numbers("running"))]
        leaders = [row for row in self._state.leaders(MAX_ROWS) if row.state != "running"]
        queued = [self._state.trials[number] for number in sorted(self._state.numbers("queued"))]
        rest = [row for row in queued if row not in leaders]
        return (running + leaders + rest)[:MAX_ROWS]

    def _lanes(self) -> list[str]:
        """Return a line for each lane. Many that are up share one, so that the table stays on the screen."""
        lanes = self._state.lanes
        up = {name: lane for name, lane in lanes.items() if lane.up}
        lines = [
            self._line(f"lane {name} ({lane.facts.get('device', '?')})", {name: lane}) for name, lane in up.items()
        ]
        if len(up) > MAX_LANES:
            lines = [self._line(f"{len(up)} lanes", up)]
        others = [
            f"lane {name} is lost: {lane.lost}"
            if lane.lost is not None
            else f"lane {name} is down, and waits for a node: {lane.down}"
            for name, lane in lanes.items()
            if not lane.up
        ]
        others += [
            f"lane {name}: {pulse.busy} ... {time.time() - self._began:.0f} s"
            for name, pulse in self._pulses.items()
            if pulse.busy is not None and name not in lanes
        ]
        return lines + others[:MAX_LANES] or [f"waiting for a lane ... {time.time() - self._began:.0f} s"]

    def _line(self, title: str, lanes: Mapping[str, Lane]) -> str:
        """Return slots, speed and memory of some lanes together."""
        n_trials, n_slots = sum(len(lane.trials) for lane in lanes.values()), sum(lane.slots for lane in lanes.values())
        line = f"{title}: {n_trials} of {n_slots} slots"
        if pulses := [self._pulses[name] for name in lanes if name in self._pulses]:
            speed, memory = sum(pulse.tokens_per_second for pulse in pulses), max(pulse.memory_mib for pulse in pulses)
            line += f", {speed:,.0f} tokens/s, peak {memory:,.0f} MiB"
            line += "".join(sorted({f", {pulse.busy}" for pulse in pulses if pulse.busy}))
        return line

    def _steps(self) -> dict[int, int]:
        """Return the step of each running trial that is past its last report."""
        found: dict[int, int] = {}
        for name, pulse in self._pulses.items():
            lane = self._state.lanes.get(name)
            for number in lane.trials & pulse.steps.keys() if lane is not None else ():
                found[number] = max(pulse.steps[number], self._state.trials[number].step)
        return found


def _best(state: SearchState) -> str:
    """Return the best trial; before one has finished, the one that is ahead."""
    if (best := state.best()) is not None:
        return f"best {best.final_loss:.4f} (trial {best.number})"
    for ahead in state.leaders(1):
        return f"ahead {ahead.eval_loss:.4f} (trial {ahead.number}, step {ahead.step})"
    return "no loss yet"


def time_left(seconds: float | None) -> str:
    """Return the time left in words."""
    if seconds is None:
        return "time left unknown"
    return f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """Return a time in the unit that people use for it."""
    if seconds >= 5400:
        return f"about {seconds / 3600:.1f} h"
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"


def _cells(row: TrialRow, step: int) -> list[str]:
    return [
        f"{step}/{row.max_steps}",
        "-" if row.eval_loss is None else f"{row.eval_loss:.4f}",
        str(row.r),
        f"{row.lora_alpha:g}",
        f"{row.lora_dropout:.3f}",
        f"{row.learning_rate:.2e}",
        "-" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}",
    ]


def _because(row: TrialRow) -> str:
    return f" ({row.reason})" if row.reason else ""


def _settings(row: TrialRow) -> str:
    return f"r {row.r}, alpha {row.lora_alpha:g}, dropout {row.lora_dropout:.3f}, lr {row.learning_rate:.2e}"
