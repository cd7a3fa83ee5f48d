"""The broker's protocol, without Ray: who waits for whom, and what a lost lane leaves behind."""

import asyncio
from typing import Any

from raylora.search.ray.broker import MAX_DEATHS, Broker, Job, Order

REPORT = {"step": 3, "eval_loss": 1.0, "checkpoint": "checkpoint-3"}
TIMEOUT = 5


def job(number: int, resume_from: str | None = None) -> Job:
    return Job(number, {"r": number}, [3, 9], resume_from)


def start(number: int, resume_from: str | None = None) -> Order:
    return Order("start", number, job(number, resume_from))


async def started(n_lanes: int = 1, n_trials: int = 1, slots: int = 1) -> Broker:
    broker = Broker(n_lanes)
    for lane in range(n_lanes):
        await broker.lane_ready(str(lane), {"slots": slots})
    for number in range(n_trials):
        await broker.submit(job(number))
    return broker


def run(coroutine: Any) -> None:
    asyncio.run(asyncio.wait_for(coroutine, TIMEOUT))


def test_a_trial_waits_at_its_rung_for_the_decision() -> None:
    async def scenario() -> None:
        broker = await started()
        assert await broker.orders("0", 1) == [start(0)]
        await broker.report(0, REPORT, final=False)
        orders = asyncio.create_task(broker.orders("0", 1))
        assert await broker.next_report(0) == REPORT
        await asyncio.sleep(0)
        assert not orders.done()  # Tune has not decided yet
        asyncio.create_task(broker.next_report(0))  # asking for the next report lets it go on
        assert await orders == [Order("go_on", 0)]

    run(scenario())


def test_a_stopped_trial_gives_its_place_to_the_next_in_the_same_breath() -> None:
    async def scenario() -> None:
        broker = await started(n_trials=2)
        assert await broker.orders("0", 1) == [start(0)]
        await broker.report(0, REPORT, final=False)
        await broker.next_report(0)
        await broker.stop(0)
        assert await broker.orders("0", 1) == [Order("leave", 0), start(1)]

    run(scenario())


def test_a_lane_gets_as_many_trials_as_it_has_places() -> None:
    async def scenario() -> None:
        broker = await started(n_trials=4, slots=3)
        assert await broker.orders("0", 1) == [start(0), start(1), start(2)]
        await broker.report(1, REPORT, final=True)
        assert await broker.orders("0", 1) == [start(3)]
        assert (await broker.lanes())["0"]["slots"] == 3

    run(scenario())


def test_a_paused_trial_comes_back_from_its_checkpoint() -> None:
    async def scenario() -> None:
        broker = await started(slots=2)
        await broker.orders("0", 1)
        await broker.report(0, REPORT, final=False)
        await broker.next_report(0)
        await broker.submit(job(0, "checkpoint-3"))  # even where its leave has not been asked for
        assert await broker.orders("0", 1) == [Order("leave", 0), start(0, "checkpoint-3")]

    run(scenario())


def test_trials_given_back_for_want_of_memory_wait_for_a_place() -> None:
    async def scenario() -> None:
        broker = await started(n_trials=3, slots=3)
        await broker.orders("0", 1)
        await broker.give_back("0", {1: "checkpoint-1", 2: None})
        orders = asyncio.create_task(broker.orders("0", 1))
        await asyncio.sleep(0)
        assert not orders.done()  # the lane has one place now, and it is taken
        await broker.report(0, REPORT, final=True)
        assert await orders == [start(1, "checkpoint-1")]

    run(scenario())


def test_victims_of_a_dead_lane_go_on_one_at_a_time_until_the_culprit_is_known() -> None:
    async def scenario() -> None:
        broker = await started(n_trials=3, slots=3)
        await broker.orders("0", 1)
        assert await broker.lane_ready("0", {"slots": 3}) == 2
        assert await broker.orders("0", 2) == [start(0)]
        await broker.report(0, REPORT, final=False)  # it has shown that it was not the culprit
        assert await broker.next_report(0) == REPORT
        asyncio.create_task(broker.next_report(0))
        assert await broker.orders("0", 2) == [Order("go_on", 0)]
        await broker.report(0, REPORT, final=True)
        assert await broker.orders("0", 2) == [start(1)]
        for life in range(3, MAX_DEATHS + 1):
            await broker.lane_ready("0", {"slots": 3})
            assert await broker.orders("0", life) == [start(1)]
        await broker.lane_ready("0", {"slots": 3})
        assert "died 3 times in this trial" in (await broker.next_report(1))["failure"]
        assert await broker.orders("0", MAX_DEATHS + 1) == [start(2)]

    run(scenario())


def test_a_request_of_a_dead_process_takes_nothing_from_the_next() -> None:
    async def scenario() -> None:
        broker = await started(n_trials=0)
        stale = asyncio.create_task(broker.orders("0", 1))
        await asyncio.sleep(0)
        await broker.lane_ready("0", {"slots": 1})
        await broker.submit(job(0))
        assert await stale is None
        assert await broker.orders("0", 2) == [start(0)]

    run(scenario())


def test_a_failed_trial_says_why() -> None:
    async def scenario() -> None:
        broker = await started()
        await broker.orders("0", 1)
        await broker.fail(0, "out of memory: made up")
        assert await broker.next_report(0) == {"failure": "out of memory: made up"}

    run(scenario())


def test_a_lost_lanes_trials_go_to_another_lane() -> None:
    async def scenario() -> None:
        broker = await started(n_lanes=2, n_trials=2, slots=2)
        await broker.orders("0", 1)
        await broker.report(0, REPORT, final=False)
        await broker.next_report(0)
        await broker.lane_lost("0", "node died")
        assert await broker.orders("1", 1) == [start(0, "checkpoint-3"), start(1)]

    run(scenario())


def test_the_last_lost_lane_ends_every_trial_even_later_ones() -> None:
    async def scenario() -> None:
        broker = await started(n_lanes=2)
        await broker.orders("0", 1)
        await broker.lane_lost("0", "node died")
        await broker.lane_lost("1", "node died too")
        assert await broker.next_report(0) == {"no_lane": "node died"}
        await broker.submit(job(1))
        assert "no_lane" in await broker.next_report(1)

    run(scenario())


def test_closing_wakes_every_waiting_lane() -> None:
    async def scenario() -> None:
        broker = await started(n_lanes=3, n_trials=0)
        waiting = [asyncio.create_task(broker.orders(str(lane), 1)) for lane in range(3)]
        await asyncio.sleep(0)
        await broker.close()
        assert await asyncio.gather(*waiting) == [None, None, None]

    run(scenario())
