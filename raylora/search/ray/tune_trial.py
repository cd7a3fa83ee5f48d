"""Tune's view of a trial: a light actor that asks the broker for the trial's reports."""

import math
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle


class TrialProxy(tune.Trainable):
    """Reused from trial to trial. A failed trial ends with a result that says so: an error would cost the actor."""

    def setup(self, config: dict[str, Any], broker: ActorHandle, max_steps: int) -> None:
        self._broker, self._max_steps = broker, max_steps
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._number = new_config["number"]
        return True

    def step(self) -> dict[str, Any]:
        report = ray.get(self._broker.next_report.remote(self._number))
        # Tune insists on the metric in every result; without a step it does not count
        return {"eval_loss": math.nan, **report, "done": report.get("step", self._max_steps) >= self._max_steps}
