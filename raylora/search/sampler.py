"""Proposes assignments with Optuna: a function of the event log and the seed.

Ray's OptunaSearch tells a stopped trial's early loss as if it were final, and a failed one in a way that TPE ignores
(docs/search.md). Here a trial that waits or was stopped is PRUNED with its intermediate losses; a failed one is PRUNED
with a violated constraint, which TPE ranks below every feasible trial; one that trains is RUNNING.
"""

import hashlib
from collections.abc import Container
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from raylora.config.assignment import Assignment, Value
from raylora.config.schema import SearchConfig, TrainingSection
from raylora.config.space import SearchSpace
from raylora.run.state import SearchState
from raylora.run.trial_row import TrialRow

FAILED = "trained_without_failing"
"""Name of the constraint; above 0 means violated."""

MAX_SHOWN = 300
"""Trials that the sampler looks at, at most, since its time grows with them: the best tenth and the newest."""

STATES = {
    "queued": TrialState.RUNNING,
    "running": TrialState.RUNNING,
    "paused": TrialState.PRUNED,
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.PRUNED,
}
"""State of a trial in the log -> what the sampler is told. A paused trial's losses are as good as a stopped one's."""


class Sampler:
    """Optuna's side of a search, without any state but the log's."""

    def __init__(self, config: SearchConfig, state: SearchState) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # else each proposal prints that a study was created
        self._search, self._training, self._state = config.search, config.training, state
        self._space = config.search_space()
        self._points = list(config.starting_points)
        self._n_startup = min(10, max(1, config.n_trials() // 3))
        if config.search.sampler == "grid":
            self._points += self._space.grid()
        self._losses: dict[int, dict[int, float]] = {}
        self._n_seen = 0
        self._known: dict[int, tuple[TrialRow, FrozenTrial]] = {}

    def exhausted(self) -> bool:
        """Return True if a grid has no point left."""
        return self._search.sampler == "grid" and self._state.n_proposed() >= len(self._points)

    def propose(self, number: int) -> tuple[Assignment, dict[str, Any]]:
        """Return the hyperparameters of a new trial.

        Starting points and a grid come first, in order; parameters that they leave out are sampled. Parameters outside
        the space keep the training section's values.

        Args:
            number: of the trial; seeds the sampler, together with `search.seed`.

        Returns:
            The assignment, and the sampled values under Optuna's names.
        """
        study = optuna.create_study(storage=_Shown(self._shown()), direction="minimize", sampler=self._sampler(number))
        index = self._state.n_proposed()
        if index < len(self._points):
            study.enqueue_trial(self._space.to_optuna(self._points[index], where=f"starting point {index + 1}"))
        trial = study.ask()
        return complete(self._space.suggest(trial), self._training), trial.params

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        digest = hashlib.sha256(f"{self._search.seed}:{number}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        if self._search.sampler != "tpe":
            return optuna.samplers.RandomSampler(seed=seed)
        # multivariate: learning rate and alpha act together; group: parameters may depend on others;
        # constant_liar: several trials train at once
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=self._n_startup, multivariate=True, group=True, constant_liar=True
        )

    def _shown(self) -> list[FrozenTrial]:
        """Return the trials that the sampler looks at, oldest first."""
        if self._search.sampler != "tpe":
            return []
        n_trials, n_best = len(self._state.trials), MAX_SHOWN // 10
        best = [row.number for row in self._state.leaders(n_best)] if n_trials > MAX_SHOWN else []
        numbers = sorted({*best, *range(max(0, n_trials + len(best) - MAX_SHOWN), n_trials)})
        for row in self._state.history[self._n_seen :]:
            self._losses.setdefault(row.number, {})[row.step] = row.eval_loss
        self._n_seen = len(self._state.history)
        return [self._frozen(self._state.trials[number]) for number in numbers]

    def _frozen(self, row: TrialRow) -> FrozenTrial:
        known = self._known.get(row.number)
        if known is None or known[0] is not row:
            params = self._state.params[row.repeat_of if row.repeat_of is not None else row.number]
            losses = self._losses.get(row.number, {})
            kinds = known[1].distributions if known else distributions(self._space, params)
            known = row, frozen_trial(row, params, kinds, losses)
            self._known[row.number] = known
        return known[1]


def complete(values: dict[str, Value], training: TrainingSection) -> Assignment:
    """Return an assignment of values from the space. What they leave out has the training section's values."""
    fixed = {name: getattr(training, name, None) for name in Assignment.model_fields}
    if isinstance(fixed["target_modules"], list):
        fixed["target_modules"] = ",".join(fixed["target_modules"])
    return Assignment.model_validate({**fixed, **values})


class _Shown(optuna.storages.InMemoryStorage):
    """Optuna's storage of one proposal. `Study.add_trials` would copy each known trial deeply, which took 90 % of it.

    Args:
        known: trials that the sampler looks at, oldest first; the new trial is number 0, and they must not be.
    """

    def __init__(self, known: list[FrozenTrial]) -> None:
        super().__init__()
        self._known = known

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        known = [trial for trial in self._known if states is None or trial.state in states]
        return known + super().get_all_trials(study_id, deepcopy, states)


def frozen_trial(
    row: TrialRow, params: dict[str, Any], kinds: dict[str, BaseDistribution], losses: dict[int, float]
) -> FrozenTrial:
    """Return a trial as Optuna knows it.

    Args:
        row: the trial as it stands.
        params: sampled values under Optuna's names.
        kinds: distribution of each of them.
        losses: step -> validation loss in nats per token.
    """
    trial = optuna.trial.create_trial(
        state=STATES[row.state],
        value=row.eval_loss if row.state == "finished" else None,
        params=params,
        distributions=kinds,
        intermediate_values=losses,
        constraints={FAILED: 1.0} if row.state == "failed" else None,
    )
    trial.number = row.number + 1  # the sampler sorts by it; 0 is the trial that it proposes
    return trial


def distributions(space: SearchSpace, params: dict[str, Any]) -> dict[str, BaseDistribution]:
    """Return Optuna's distribution of each sampled value, by letting the space suggest the values once more."""
    recorder = _Recorder(params)
    space.suggest(recorder)
    return recorder.found


class _Recorder:
    """Stands in for an Optuna trial whose values are known, and notes their distributions."""

    def __init__(self, params: dict[str, Any]) -> None:
        self._params = params
        self.found: dict[str, BaseDistribution] = {}

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._note(name, optuna.distributions.CategoricalDistribution(choices))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return self._note(name, optuna.distributions.FloatDistribution(low, high, log=log))

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return self._note(name, optuna.distributions.IntDistribution(low, high, log=log))

    def _note(self, name: str, distribution: BaseDistribution) -> Any:
        self.found[name] = distribution
        return self._params[name]
