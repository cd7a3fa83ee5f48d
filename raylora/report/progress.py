"""Shows a search as it goes on: a live table on a terminal, plain lines elsewhere."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raylora.run.tables import ENDED, Records, TrialRow

MAX_ROWS = 20


class Progress:
    """Use as a context manager around the search."""

    def __init__(self, records: Records, n_trials: int, rungs: list[int], console: Console) -> None:
        self._records, self._n_trials, self._rungs, self._console = records, n_trials, rungs, console
        self._began = time.monotonic()
        self._n_before = sum(records.count(state) for state in ENDED)
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

    def changed(self) -> None:
        """A trial was proposed."""
        if self._live:
            self._live.refresh()

    def reported(self, number: int) -> None:
        """A trial reached a rung."""
        trial = self._records.trials[number]
        if not self._live:
            self._console.print(f"trial {number}: step {trial.step}/{trial.max_steps}, eval_loss {trial.eval_loss:.4f}")

    def ended(self, number: int) -> None:
        """A trial finished, was stopped or failed."""
        trial = self._records.trials[number]
        if not self._live:
            self._console.print(
                f"trial {number}: {trial.state}{_because(trial)} ({_settings(trial)}); {self.summary()}"
            )

    def note(self, text: str) -> None:
        """Something that the user should know meanwhile."""
        self._console.print(text)

    def summary(self) -> str:
        """Counts, best so far and time left, in one line."""
        records = self._records
        ended = sum(records.count(state) for state in ENDED)
        counts = ", ".join(f"{records.count(state)} {state}" for state in (*ENDED, "paused", "running"))
        best = records.best()
        best_text = (
            f"best {best.eval_loss:.4f} (trial {best.number})" if best and best.eval_loss is not None else "no best yet"
        )
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
        best = self._records.best()
        for trial in list(self._records.trials.values())[-MAX_ROWS:]:
            style = {"failed": "red", "stopped": "dim", "paused": "dim", "running": "cyan"}.get(trial.state)
            table.add_row(*_cells(trial), style="bold green" if best and trial.number == best.number else style)
        return Group(table, Text(self.summary()))


def _cells(trial: TrialRow) -> list[str]:
    return [
        str(trial.number),
        trial.state + (_because(trial) if trial.state == "failed" else ""),
        f"{trial.step}/{trial.max_steps}",
        "-" if trial.eval_loss is None else f"{trial.eval_loss:.4f}",
        "-" if trial.train_loss is None else f"{trial.train_loss:.4f}",
        str(trial.r),
        f"{trial.lora_alpha:g}",
        f"{trial.lora_dropout:.3f}",
        f"{trial.learning_rate:.2e}",
        "-" if trial.tokens_per_second is None else f"{trial.tokens_per_second:.0f}",
    ]


def _because(trial: TrialRow) -> str:
    return f" ({trial.reason})" if trial.reason else ""


def _settings(trial: TrialRow) -> str:
    return f"r {trial.r}, alpha {trial.lora_alpha:g}, dropout {trial.lora_dropout:.3f}, lr {trial.learning_rate:.2e}"
