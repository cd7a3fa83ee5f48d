"""Reads what a report tells from the files of a run directory."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylora.config.schema import SearchConfig
from raylora.errors import RunDirectoryError
from raylora.run.atomic import read_json
from raylora.run.directory import RunDirectory
from raylora.run.events import Event, SessionStarted, read_events
from raylora.run.state import ENDED, UNDER_WAY, SearchState
from raylora.run.trial_row import TrialRow


@dataclass(frozen=True)
class RunFacts:
    """One search, as far as it has come."""

    run: RunDirectory
    config: SearchConfig
    provenance: dict[str, Any]
    state: SearchState
    merge: dict[str, Any] | None
    """Content of `merge.json`; None if trials have finished since then."""

    evaluation: dict[str, Any] | None
    """Content of `evaluation.json`; None if `merge` is."""

    seconds: float
    """Time in which the search ran, sessions added up, without merge and check."""

    answers: list[dict[str, Any]]
    """Lines of `answers.jsonl`; empty if the check was made by an earlier version of raylora, or not yet."""

    @property
    def chosen(self) -> TrialRow | None:
        """The trial that was merged, or the best one before the merge; None if no trial has finished."""
        merged = self.merge["trial"] if self.merge else None
        return self.state.best() if merged is None else self.state.trials[merged]

    @property
    def trials(self) -> list[TrialRow]:
        """All trials: finished ones first, failed ones last, the lowest loss first among each."""
        return sorted(self.state.trials.values(), key=_order)

    @property
    def max_steps(self) -> int:
        """Full budget in optimizer steps."""
        return int(self.provenance["rungs"][-1])

    @property
    def judged(self) -> str:
        """Merged model that answers are judged by: the first that was checked; empty if none was."""
        models = self.evaluation["models"] if self.evaluation else {}
        return next((name for name in models if name.startswith("merged")), "")

    def size(self) -> str:
        """Return the number of trials in words, and that of their repetitions."""
        n_trials = self.state.n_proposed()
        n_repetitions = len(self.state.trials) - n_trials
        trials = f"{n_trials} trial{'s' * (n_trials != 1)}"
        return f"{trials} and {n_repetitions} repetition{'s' * (n_repetitions != 1)}" if n_repetitions else trials

    def counts(self) -> str:
        """Return the number of trials in each state, in words."""
        return ", ".join(f"{self.state.count(name)} {name}" for name in (*ENDED, *UNDER_WAY) if self.state.count(name))

    def unfinished(self) -> str | None:
        """Return a sentence if trials are still to end, or to begin."""
        ended = sum(self.state.count(name) for name in ENDED)
        to_begin = self.merge is None and self.state.n_proposed() < self.config.n_trials()
        if not to_begin and not self.state.numbers(*UNDER_WAY):
            return None
        return (
            f"This search is not done: {ended} of {self.config.n_trials()} trials have ended. "
            "All figures are as of now, and the best trial may change."
        )

    def losses_at(self, step: int) -> dict[int, float]:
        """Return trial -> validation loss at one step, repetitions left out."""
        trials = self.state.trials
        return {
            row.number: row.eval_loss
            for row in self.state.history
            if row.step == step and trials[row.number].repeat_of is None
        }

    def samples(self) -> list[dict[str, Any]]:
        """Return the first prompts in the form of `answers.jsonl`, of whatever version the check is."""
        if self.answers or not self.evaluation:
            return self.answers[: self.config.evaluation.n_samples]
        return [
            {
                "prompt": sample["prompt"],
                "references": [sample["reference"]],
                "answers": {name: {"text": text} for name, text in sample.items() if name in self.evaluation["models"]},
            }
            for sample in self.evaluation["samples"]
        ]


def public(name: str) -> str:
    """Return the name of a base or of data, without its path on this machine."""
    return Path(name).name if Path(name).is_absolute() else name


def load_facts(run: RunDirectory) -> RunFacts:
    """Read a run directory.

    Raises:
        RunDirectoryError: it holds no trials.
    """
    events = list(read_events(run.events_file))
    state = SearchState(events)
    if not state.trials:
        raise RunDirectoryError(f"{run.location} holds no trials yet, so there is nothing to report")
    merge = state.merge_of(run)
    is_checked = merge is not None and run.evaluation_file.is_file()
    has_answers = is_checked and run.answers_file.is_file()
    lines = run.answers_file.read_text(encoding="utf-8").split("\n") if has_answers else []
    return RunFacts(
        run=run,
        config=run.config(),
        provenance=run.provenance(),
        state=state,
        merge=merge,
        evaluation=read_json(run.evaluation_file) if is_checked else None,
        seconds=_seconds(events),
        answers=[json.loads(line) for line in lines if line],
    )


def _seconds(events: list[Event]) -> float:
    """Return the time from the first event of each session to its last one, added up."""
    seconds, before = 0.0, math.inf
    for event in events:
        if not isinstance(event, SessionStarted):
            seconds += max(0.0, event.time - before)
        before = event.time
    return seconds


def _order(trial: TrialRow) -> tuple[bool, bool, int, float]:
    """Return the sort key of a trial."""
    loss = trial.eval_loss if trial.eval_loss is not None else 0.0
    return trial.state != "finished", trial.state == "failed", -trial.step, loss
