"""Shows a search as it goes on: a live table on a terminal, plain lines elsewhere."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raylora.run.events import Event, Failed, Finished, LaneLost, LaneUp, Reported, Stopped
from raylora.run.state import ENDED, STATES, SearchState, TrialRow

MAX_ROWS = 20


class Progress:
    """Use as a context manager around the search."""

    def __init__(self, state: SearchState, n_trials: int, console: Console) -> None:
        self._state, self._n_trials, self._console = state, n_trials, console
        self._began = time.monotonic()
        self._n_before = sum(state.count(ended) for ended in ENDED)
        self._live = (
            Live(console=console, refresh_per_second=2, get_renderable=self._render) if console.is_terminal else None
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
            case LaneUp() if event.facts.get("reason"):
                self.note(f"lane {event.lane} trains one trial at a time, with TRL: {event.facts['reason']}")
            case LaneUp() if event.facts.get("notes"):
                self.note(f"lane {event.lane}: {'; '.join(event.facts['notes'])}")
            case LaneLost():
                self.note(f"lane {event.lane}: {event.reason}" + ("" if event.for_good else "; it is up again"))
            case Reported() if not self._live:
                row = self._state.trials[event.number]
                self.note(f"trial {row.number}: step {row.step}/{row.max_steps}, eval_loss {row.eval_loss:.4f}")
            case Finished() | Stopped() | Failed() if not self._live:
                row = self._state.trials[event.number]
                self.note(f"trial {row.number}: {row.state}{_because(row)} ({_settings(row)}); {self.summary()}")

    def note(self, text: str) -> None:
        """Print a line that the user should see meanwhile."""
        self._console.print(text)

    def summary(self) -> str:
        """Return counts, best so far and time left, in one line."""
        state = self._state
        ended = sum(state.count(name) for name in ENDED)
        counts = ", ".join(f"{state.count(name)} {name}" for name in reversed(STATES) if state.count(name))
        best = state.best()
        best_text = f"best {best.final_loss:.4f} (trial {best.number})" if best else "no best yet"
        return f"{ended}/{self._n_trials} trials: {counts}; {best_text}; {self._time_left(ended)}"

    def _time_left(self, ended: int) -> str:
        done = ended - self._n_before
        if done < 1:
            return "time left unknown"
        seconds = (time.monotonic() - self._began) / done * max(0, self._n_trials - ended)
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for column in ("trial", "state", "step", "eval_loss", "train_loss", "r", "alpha", "dropout", "lr", "tokens/s"):
            table.add_column(column, justify="left" if column == "state" else "right")
        best = self._state.best()
        styles = {"failed": "red", "stopped": "dim", "paused": "dim", "queued": "dim", "running": "cyan"}
        for row in list(self._state.trials.values())[-MAX_ROWS:]:
            style = "bold green" if best and row.number == best.number else styles.get(row.state)
            table.add_row(*_cells(row), style=style)
        return Group(table, Text(self.summary()))


def _cells(row: TrialRow) -> list[str]:
    return [
        str(row.number),
        row.state + (_because(row) if row.state == "failed" else ""),
        f"{row.step}/{row.max_steps}",
        "-" if row.eval_loss is None else f"{row.eval_loss:.4f}",
        "-" if row.train_loss is None else f"{row.train_loss:.4f}",
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
