"""Tune's view of a lane: one light Tune trial, whose results are what the lane's trials report.

One for each lane and not for each trial: the number of trials that share a GPU costs no process anywhere.
"""

import math
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle


class LaneTrial(tune.Trainable):
    """Hands the batches of one lane from the broker to Tune. One that dies is replaced, and nothing is lost with it."""

    def setup(self, config: dict[str, Any], broker: ActorHandle) -> None:
        self._lane, self._broker, self._n_seen = config["lane"], broker, 0

    def step(self) -> dict[str, Any]:
        news = ray.get(self._broker.news.remote(self._lane, self._n_seen))
        self._n_seen, batches = news if news is not None else (self._n_seen, [])
        # Tune insists on the searcher's metric in every result (Ray 2.60)
        return {"batches": batches, "eval_loss": math.nan, "done": news is None}
