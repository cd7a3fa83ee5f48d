"""Mirrors a search into `study.db` for optuna-dashboard. The search never reads it, and never waits for it."""

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from optuna.trial import TrialState

from raylora.config.space import SearchSpace
from raylora.errors import first_line
from raylora.run.events import Event, Failed, Finished, Proposed, Reported, Stopped
from raylora.search.sampler import FAILED, distributions

STUDY = "raylora"

SECONDS_TO_CATCH_UP = 30.0
"""Longest wait of a search for its mirror at the end; SQLite takes some 10 ms an event."""


class StudyMirror:
    """Optuna's study of one run in SQLite, written anew from the log in each session, by a thread of its own.

    A mirror that cannot be written is noted once and left alone: it never ends a search.

    Args:
        file: `study.db`.
        space: the search space.
        note: shows the user a line.
    """

    def __init__(self, file: Path, space: SearchSpace, note: Callable[[str], None]) -> None:
        self._file, self._space, self._note = file, space, note
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._params: dict[int, dict[str, Any]] = {}
        self._losses: dict[int, float] = {}
        self._thread = threading.Thread(target=self._run, name="study-mirror", daemon=True)
        self._thread.start()

    def add(self, event: Event) -> None:
        """Take in an event, to be mirrored soon."""
        if isinstance(event, Proposed | Reported | Finished | Stopped | Failed):
            self._events.put(event)

    def close(self) -> None:
        """Mirror what is left, and stop."""
        self._events.put(None)
        self._thread.join(SECONDS_TO_CATCH_UP)

    def _run(self) -> None:
        try:
            study = self._open()
            while (event := self._events.get()) is not None:
                self._mirror(study, event)
        except Exception as error:  # SQLite, SQLAlchemy and Optuna each raise their own; none may end the search
            self._note(
                f"study.db is not kept any more ({type(error).__name__}: {first_line(error)}); the search goes on"
            )

    def _open(self) -> optuna.Study:
        self._file.unlink(missing_ok=True)
        storage = f"sqlite:///{quote(str(self._file))}"  # a path may have a question mark in it
        return optuna.create_study(study_name=STUDY, storage=storage, direction="minimize")

    def _mirror(self, study: optuna.Study, event: Event) -> None:
        match event:
            case Proposed():
                self._add_trial(study, event)
            case Reported():
                loss = self._losses[event.number] = event.metrics["eval_loss"]
                self._trial(study, event.number).report(loss, event.metrics["step"])
            case Finished():
                study.tell(event.number, self._losses[event.number])
            case Stopped():
                study.tell(event.number, state=TrialState.PRUNED)
            case Failed():
                trial = self._trial(study, event.number)
                trial.set_user_attr("failed", event.reason)
                trial.set_constraint(FAILED, 1.0)
                study.tell(event.number, state=TrialState.PRUNED)

    def _add_trial(self, study: optuna.Study, event: Proposed) -> None:
        params = event.params if event.repeat_of is None else self._params[event.repeat_of]
        self._params[event.number] = params
        attributes: dict[str, Any] = {"assignment": event.assignment}
        if event.repeat_of is not None:
            attributes["repeat_of"] = event.repeat_of
        trial = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions=distributions(self._space, params),
            user_attrs=attributes,
        )
        study.add_trial(trial)

    @staticmethod
    def _trial(study: optuna.Study, number: int) -> optuna.trial.Trial:
        return optuna.trial.Trial(study, number + 1)  # SQLite counts the trials of a new file from 1
