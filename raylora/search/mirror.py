"""Mirrors a search into `study.db` for optuna-dashboard. The search never reads it."""

import logging
from pathlib import Path

import optuna
from optuna.trial import TrialState

from raylora.config.space import SearchSpace
from raylora.run.events import Event, Failed, Finished, Proposed, Reported, Stopped
from raylora.run.state import SearchState
from raylora.search.sampler import FAILED, distributions

STUDY = "raylora"


class StudyMirror:
    """Optuna's study of one run in SQLite, written anew from the log at the start of each session.

    A mirror that cannot be written says so once and is left alone: it never ends a search.
    """

    def __init__(self, file: Path, space: SearchSpace, state: SearchState) -> None:
        self._file, self._space, self._state = file, space, state
        self._events: list[Event] = []
        self._ids: dict[int, int] = {}
        self._study: optuna.Study | None = None
        self.broken: str | None = None
        """Why the mirror was given up."""

    def add(self, event: Event) -> None:
        """Take an event to be mirrored by the next `write`."""
        if self.broken is None and isinstance(event, Proposed | Reported | Finished | Stopped | Failed):
            self._events.append(event)

    def write(self) -> None:
        """Mirror all events that have been added since the last time."""
        events, self._events = self._events, []
        if self.broken is not None:
            return
        try:
            if self._study is None:
                self._study = self._open()
            for event in events:
                self._mirror(self._study, event)
        except Exception as error:  # SQLite, SQLAlchemy and Optuna each raise their own; none may end the search
            self.broken = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            logging.getLogger(__name__).debug("study mirror", exc_info=True)

    def _open(self) -> optuna.Study:
        self._file.unlink(missing_ok=True)
        study = optuna.create_study(study_name=STUDY, storage=f"sqlite:///{self._file}", direction="minimize")
        study.set_metric_names(["eval_loss"])
        return study

    def _mirror(self, study: optuna.Study, event: Event) -> None:
        match event:
            case Proposed():
                source = event.number if event.repeat_of is None else event.repeat_of
                params = self._state.params[source]
                attributes = {"assignment": event.assignment, "repeat_of": event.repeat_of}
                study.add_trial(
                    optuna.trial.create_trial(
                        state=TrialState.RUNNING,
                        params=params,
                        distributions=distributions(self._space, params),
                        user_attrs={name: value for name, value in attributes.items() if value is not None},
                    )
                )
                self._ids[event.number] = len(self._ids) + 1  # SQLite counts a new study's trials from 1
            case Reported():
                self._trial(study, event.number).report(event.metrics["eval_loss"], event.metrics["step"])
            case Finished():
                study.tell(event.number, self._state.trials[event.number].eval_loss)
            case Stopped():
                study.tell(event.number, state=TrialState.PRUNED)
            case Failed():
                trial = self._trial(study, event.number)
                trial.set_user_attr("failed", event.reason)
                trial.set_constraint(FAILED, 1.0)
                study.tell(event.number, state=TrialState.PRUNED)

    def _trial(self, study: optuna.Study, number: int) -> optuna.trial.Trial:
        return optuna.trial.Trial(study, self._ids[number])
