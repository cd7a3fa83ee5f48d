"""Proposes assignments with Optuna and tells it what became of them, in a file that outlives the search.

Ray's OptunaSearch tells a stopped trial's early loss as if it were final, and a failed one in a way that TPE ignores
(docs/design.md). Here a stopped trial is PRUNED with its intermediate values; a failed one is PRUNED with a violated
constraint, which TPE ranks below every feasible trial.
"""

from collections.abc import Set
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from raylora.config.assignment import Assignment
from raylora.config.schema import SearchConfig

FAILED = "trained_without_failing"
"""Name of the constraint; above 0 means violated."""


class Study:
    """Optuna's study of one run. Trials are known by their number, from 0."""

    def __init__(self, config: SearchConfig, *, file: Path | None = None, n_lanes: int = 1) -> None:
        """Opens the study in `file` (in memory if None), or starts it with the starting points or the grid queued."""
        self._config, self._space = config, config.search_space()
        self._study = optuna.create_study(
            study_name="raylora",
            storage=f"sqlite:///{file}" if file else None,
            direction="minimize",
            load_if_exists=True,
        )
        self._study.sampler = self._sampler(n_lanes)
        if not self._study.trials:
            self._study.set_metric_names(["eval_loss"])
            points = list(config.starting_points)
            if config.search.sampler == "grid":
                points += self._space.grid()
            for number, point in enumerate(points, 1):
                self._study.enqueue_trial(self._space.to_optuna(point, where=f"starting point {number}"))

    def ask(self, paused: Set[int] = frozenset()) -> tuple[int, Assignment]:
        """The next assignment to train: parameters outside the space keep the training section's values.

        Args:
            paused: trials that wait at a rung. They are open for Optuna, whose sampler would think nothing of them; it
                is shown them as pruned, so that it learns from their intermediate losses.
        """
        waiting = any(trial.state == TrialState.WAITING for trial in self._study.trials)
        if paused and not waiting:
            view = self._with_pruned(paused).ask()
            self._space.suggest(view)
            self._study.enqueue_trial(view.params)
        trial = self._study.ask()
        values = {name: getattr(self._config.training, name, None) for name in Assignment.model_fields}
        if isinstance(values["target_modules"], list):
            values["target_modules"] = ",".join(values["target_modules"])
        assignment = Assignment.model_validate({**values, **self._space.suggest(trial)})
        trial.set_user_attr("assignment", assignment.model_dump())
        return trial.number, assignment

    def repeat(self, number: int, seed: int) -> tuple[int, Assignment]:
        """A new trial with the assignment of another and a seed of its own; it counts as no proposal."""
        other = self._study.trials[number]
        assignment = Assignment.model_validate({**other.user_attrs["assignment"], "seed": seed})
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params=other.params,
                distributions=other.distributions,
                user_attrs={"assignment": assignment.model_dump(), "repeat_of": number},
            )
        )
        return self._study.trials[-1].number, assignment

    def repeat_of(self, number: int) -> int | None:
        """The trial whose assignment this one repeats; None for a proposal."""
        return self._study.trials[number].user_attrs.get("repeat_of")

    def n_asked(self) -> int:
        """Trials proposed so far, whatever became of them."""
        return sum(
            "assignment" in trial.user_attrs and "repeat_of" not in trial.user_attrs for trial in self._study.trials
        )

    def running(self) -> dict[int, Assignment]:
        """Trials that were proposed and have not ended, by number."""
        return {
            trial.number: Assignment.model_validate(trial.user_attrs["assignment"])
            for trial in self._study.trials
            if trial.state == TrialState.RUNNING and "assignment" in trial.user_attrs
        }

    def report(self, number: int, step: int, eval_loss: float) -> None:
        """An intermediate loss."""
        self._trial(number).report(eval_loss, step)

    def finish(self, number: int, eval_loss: float) -> None:
        """The trial reached the full budget."""
        self._study.tell(number, eval_loss)

    def stop(self, number: int) -> None:
        """The trial was stopped early; its intermediate losses say how good it was."""
        self._study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        """The trial failed; the sampler shall keep away from it."""
        trial = self._trial(number)
        trial.set_user_attr("failed", reason)
        trial.set_constraint(FAILED, 1.0)
        self._study.tell(number, state=TrialState.PRUNED)

    def discard_unassigned(self) -> None:
        """Closes trials that were drawn but never placed, which a kill between the two leaves behind."""
        for trial in self._study.trials:
            if trial.state == TrialState.RUNNING and "assignment" not in trial.user_attrs:
                self._study.tell(trial.number, state=TrialState.FAIL)

    def _trial(self, number: int) -> optuna.trial.Trial:
        return optuna.trial.Trial(self._study, self._study.trials[number]._trial_id)

    def _with_pruned(self, paused: Set[int]) -> optuna.Study:
        """A copy of the study in memory, in which paused trials are pruned."""
        copy = optuna.create_study(direction="minimize", sampler=self._sampler(n_lanes=2))
        for trial in self._study.trials:
            if trial.number in paused:
                trial.state, trial.datetime_complete = TrialState.PRUNED, trial.datetime_start
            copy.add_trial(trial)
        return copy

    def _sampler(self, n_lanes: int) -> optuna.samplers.BaseSampler:
        # a resumed search must not draw the same points again, hence the number of trials in the seed
        seed = self._config.search.seed + 1000 * len(self._study.trials)
        if self._config.search.sampler != "tpe":
            return optuna.samplers.RandomSampler(seed=seed)
        # multivariate: learning rate and alpha act together; group: parameters may depend on others
        options: dict[str, Any] = {"multivariate": True, "group": True, "constant_liar": n_lanes > 1}
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=self._n_startup(), **options)

    def _n_startup(self) -> int:
        """Random trials before TPE begins: Optuna's 10, or a third of a short search."""
        return min(10, max(1, self._config.n_trials() // 3))
