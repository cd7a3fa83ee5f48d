"""Events become the runs that trackers show: a point a step, and the best loss so far."""

from raylora.trackers.records import Point, Records, points_of
from tests.helpers import reported
from tests.trackers.conftest import TO_FIRST_RUNG, TO_THE_END


def values(point: Point, *names: str) -> list[float]:
    return [point.values[name] for name in names]


def test_every_step_is_a_point_and_the_last_has_the_rung() -> None:
    first, last = points_of(reported(0, 9, 2.0, step_losses=[4.0, 3.0], step_learning_rates=[1e-3, 2e-3]))
    assert (first.step, first.values) == (8, {"train/loss": 4.0, "train/learning_rate": 1e-3})
    assert (last.step, *values(last, "train/loss", "train/learning_rate", "eval/loss")) == (9, 3.0, 2e-3, 2.0)


def test_a_report_from_before_steps_were_kept_is_one_point() -> None:
    event = reported(0, 9, 2.0)
    del event.metrics["step_losses"], event.metrics["step_learning_rates"]
    (point,) = points_of(event)
    assert (point.step, *values(point, "eval/loss", "train/mean_loss")) == (9, 2.0, 2.5)


def test_records_follow_the_state_of_each_trial() -> None:
    records = Records({})
    for event in TO_FIRST_RUNG:
        records.add(event)
    assert [(record.key, record.state) for record in records.take_changed()] == [
        ("search", "running"),
        ("trial-0000", "paused"),
        ("trial-0001", "running"),
    ]
    assert records.take_changed() == []
    for event in TO_THE_END:
        records.add(event)
    search, finished, failed = records.take_changed()
    assert (finished.state, [point.step for point in finished.points]) == ("finished", [1, 2, 3])
    assert (failed.state, failed.reason, failed.params["r"]) == ("failed", "diverged", 8)
    # first the failed trial ends, after 2 + 2 steps of both; then the finished one, a step later
    names = ("search/failed", "search/finished", "search/optimizer_steps")
    assert [(point.step, *values(point, *names)) for point in search.points] == [(1, 1, 0, 4), (2, 1, 1, 5)]
    assert [point.values.get("search/best_eval_loss") for point in search.points] == [None, 1.5]


def test_a_search_that_was_cut_off_is_paused_and_one_that_is_done_finished() -> None:
    records = Records({})
    for event in TO_FIRST_RUNG:
        records.add(event)
    assert records.end({}, 1.0).state == "paused"
    for event in TO_THE_END:
        records.add(event)
    assert records.end({}, 2.0).state == "finished"
