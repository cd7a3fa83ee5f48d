"""Tune's searcher: offers Tune the lanes as its trials, and hands what they report to the controller."""

from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.tune.search import Searcher

from raylora.search.controller import SearchController


class LaneSearcher(Searcher):
    """One Tune trial per lane; every decision about a trial of ours is the controller's.

    Args:
        lanes: names of the lanes.
        controller: decides.
        broker: from `start_broker`.
        after_batch: called when a batch has been answered.
    """

    def __init__(
        self, lanes: list[str], controller: SearchController, broker: ActorHandle, after_batch: Callable[[], None]
    ) -> None:
        super().__init__(metric="eval_loss", mode="min")
        self._lanes, self._controller, self._broker, self._after_batch = list(lanes), controller, broker, after_batch

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        return {"lane": self._lanes.pop(0)} if self._lanes else Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        for batch in result["batches"]:
            if self._controller.over:
                break
            try:
                orders = self._controller.handle(batch)
            except OSError as error:  # the log cannot be written: nothing that was decided may be acted on
                self._controller.error = f"the event log cannot be written: {error}; mend it and go on with --resume"
                break
            processes = {lane: self._controller.state.lanes[lane].process for lane in orders}
            ray.get(self._broker.deliver.remote(orders, processes, batch))
            self._after_batch()
        if self._controller.over:
            self._broker.close.remote()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result:
            self.on_trial_result(trial_id, result)

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher for `Tuner.restore`, which is not used here: the event log is the state."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: all events are on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing, likewise."""
