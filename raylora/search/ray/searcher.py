"""Says what a search trains next, and tells Optuna and the tables what became of it."""

import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.tune.search import Searcher

from raylora.config.assignment import Assignment
from raylora.config.schema import SearchConfig
from raylora.report.progress import Progress
from raylora.run.tables import Records
from raylora.search.halving import Halving
from raylora.search.ray.broker import Job
from raylora.search.sampler import Study


class Bookkeeper(Searcher):
    """Tune's searcher. Every event of a trial passes here, so here alone its state is decided.

    A Tune trial is one leg of a trial of ours: from its start, or the rung it was promoted from, to the rung where it
    pauses. A trial is finished when it reached the full budget, failed when it raised, paused at a rung, and stopped
    when it can no longer be promoted.

    Args:
        config: of the search.
        rungs: optimizer steps at which trials are compared; the last is the full budget.
        n_lanes: lanes that are coming up.
        study: Optuna's side, as it stands.
        records: the tables, as they stand.
        broker: from `start_broker`.
        progress: is told what changes.
    """

    def __init__(
        self,
        config: SearchConfig,
        rungs: list[int],
        n_lanes: int,
        study: Study,
        records: Records,
        broker: ActorHandle,
        progress: Progress,
    ) -> None:
        super().__init__(metric="eval_loss", mode="min")
        self._search, self._n_trials, self._rungs, self._n_lanes = config.search, config.n_trials(), rungs, n_lanes
        self._study, self._records, self._broker, self._progress = study, records, broker, progress
        scheduler = config.search.scheduler
        self._compared = rungs[-1:] if scheduler == "none" else rungs
        """Steps at which trials are compared and may pause."""

        self._halving = Halving(
            len(self._compared),
            config.search.reduction_factor,
            synchronous=scheduler == "halving",
            finalists=config.search.finalists,
        )
        self._legs: dict[str, int] = {}
        """Tune's id of each leg under way -> number of its trial."""

        self._lanes_seen: set[str] = set()
        self._to_resume = study.running()
        self._began = time.monotonic()
        self._replay()
        self.no_lane: str | None = None
        """Why the last lane is gone, once it is."""

        self.interrupted = False
        """Set by Ctrl-C; trials under way then stay running, for a resumed search to take up."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.interrupted or self.no_lane or self.gave_up():
            return Searcher.FINISHED
        if len(self._legs) >= self._places():
            return None
        number = self._next()
        if number is None:
            return None if self._legs else Searcher.FINISHED
        self._legs[trial_id] = number
        self._progress.changed()
        trial = self._records.trials[number]
        rungs = self._rungs if trial.repeat_of is None else self._rungs[-1:]
        job = Job(number, trial.assignment().model_dump(), rungs, trial.checkpoint)
        # from here and not from Tune's actor: training need not wait until that one has started
        ray.get(self._broker.submit.remote(job))
        return {"number": number}

    def goes_on(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether a trial that has reported trains past its rung at once; otherwise it pauses."""
        self.on_trial_result(trial_id, result)
        trial = self._records.trials[self._legs[trial_id]]
        if trial.repeat_of is not None or trial.step not in self._compared:
            return True
        return self._halving.promote(trial.number) is not None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        number = self._legs[trial_id]
        before = self._records.trials[number]
        if result.get("step", 0) > before.step:
            self._study.report(number, result["step"], result["eval_loss"])
            self._records.reported(number, result)
            if before.repeat_of is None and result["step"] in self._compared:
                self._halving.report(number, self._compared.index(result["step"]), result["eval_loss"])
            self._progress.reported(number)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if self.interrupted:
            return
        result = result or {}
        self.on_trial_result(trial_id, result)
        number = self._legs.pop(trial_id)
        if "no_lane" in result:
            self.no_lane = result["no_lane"]  # the trial stays running, for a resumed search to take up
            return
        trial = self._records.trials[number]
        reason = "Tune's actor of the trial died" if error else result.get("failure")
        if reason is not None:
            self._records.ended(number, "failed", reason)
            self._study.fail(number, reason)
            self._halving.fail(number)
            self._progress.ended(number)
        elif trial.step >= self._rungs[-1] and trial.eval_loss is not None:
            self._records.ended(number, "finished")
            self._study.finish(number, trial.eval_loss)
            self._progress.ended(number)
        else:
            self._records.paused(number)
        self._broker.stop.remote(number)
        self._stop_who_is_out()

    def gave_up(self) -> bool:
        """Whether the first trials all failed."""
        ended = [trial.state for trial in self._records.trials.values() if trial.state != "running"]
        return len(ended) >= self._search.max_initial_failures and all(state == "failed" for state in ended)

    def _places(self) -> int:
        """Trials that can train at once; until a lane is up, one for each, so that Tune's actors start meanwhile."""
        lanes = ray.get(self._broker.lanes.remote())
        for name in lanes.keys() - self._lanes_seen:
            self._lanes_seen.add(name)
            if reason := lanes[name].get("reason"):
                self._progress.note(f"lane {name} trains one trial at a time, with TRL: {reason}")
        return sum(lane["slots"] for lane in lanes.values()) or self._n_lanes

    def _next(self) -> int | None:
        """Whom to train next: left over from an interrupted search, promoted, new, or repeated."""
        if self._to_resume:
            number = min(self._to_resume)
            return self._start(number, self._to_resume.pop(number), self._study.repeat_of(number))
        promoted = self._promote()
        if promoted is None and self._study.n_asked() < self._n_trials and not self._out_of_time():
            return self._start(*self._study.ask(self._records.numbers("paused")))
        if promoted is None:
            self._halving.close()
            promoted = self._promote()
            self._stop_who_is_out()
        return self._repeat() if promoted is None and not self._legs else promoted

    def _start(self, number: int, assignment: Assignment, repeat_of: int | None = None) -> int:
        if number not in self._records.trials and repeat_of is None:
            self._halving.enter(number)
        self._records.started(number, assignment, self._rungs[-1], repeat_of)
        return number

    def _promote(self) -> int | None:
        # Tune may ask for the next trial before it says that a leg has ended whose report it has shown
        number = self._halving.promote(busy=self._legs.values())
        if number is not None:
            self._records.resumed(number)
        return number

    def _repeat(self) -> int | None:
        """The next of the best assignments with another seed, once all trials have ended."""
        for best in self._records.leaders(self._search.repeat_best):
            seeds = {trial.seed for trial in self._records.runs_of(best.number)}
            if len(seeds) <= self._search.repeats:
                return self._start(*self._study.repeat(best.number, max(seeds) + 1), repeat_of=best.number)
        return None

    def _stop_who_is_out(self) -> None:
        for number in self._halving.out():
            if self._records.trials[number].state == "paused":
                self._records.ended(number, "stopped", f"not promoted from step {self._records.trials[number].step}")
                self._study.stop(number)
                self._progress.ended(number)

    def _replay(self) -> None:
        """Shows the halving what an earlier session saw, and leaves to it the trials that stand at a rung."""
        for trial in list(self._records.trials.values()):
            if trial.repeat_of is not None:
                continue
            if trial.state == "running" and trial.step in self._compared:
                # on its way to the next rung, or killed before that was decided; it is decided anew
                self._records.paused(trial.number)
                trial = self._records.trials[trial.number]
            losses = [
                row.eval_loss
                for row in self._records.history
                if row.number == trial.number and row.step in self._compared
            ]
            for rung, loss in enumerate(losses):
                self._halving.enter(trial.number, rung)
                self._halving.report(trial.number, rung, loss)
            if trial.state in ("running", "failed"):
                self._halving.enter(trial.number, len(losses))
            if trial.state == "failed":
                self._halving.fail(trial.number)
            elif trial.state == "stopped":
                self._halving.withdraw(trial.number)
            elif trial.state == "paused":
                del self._to_resume[trial.number]

    def _out_of_time(self) -> bool:
        budget = self._search.time_budget_minutes
        return budget is not None and time.monotonic() - self._began > 60 * budget

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher for `Tuner.restore`, which is not used here; see `reconcile`."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: study and tables are on disk after every event."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore, likewise."""


def reconcile(study: Study, records: Records) -> None:
    """Makes the study agree with the tables, which are written first, after a kill between the two."""
    study.discard_unassigned()
    for number in study.running():
        trial = records.trials.get(number)
        if trial is not None and trial.state == "running" and trial.step >= trial.max_steps:
            records.ended(number, "finished")  # killed between its last report and this
            trial = records.trials[number]
        if trial is None or trial.state in ("running", "paused"):
            continue
        if trial.state == "finished" and trial.eval_loss is not None:
            study.finish(number, trial.eval_loss)
        elif trial.state == "stopped":
            study.stop(number)
        else:
            study.fail(number, trial.reason or "unknown")
