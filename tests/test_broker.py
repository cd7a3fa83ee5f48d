"""The broker's protocol, without Ray: who waits for whom, and what a lost lane leaves behind."""

import asyncio
from typing import Any

from raylora.broker import MAX_ATTEMPTS, Broker

REPORT = {"step": 3, "eval_loss": 1.0, "checkpoint": "checkpoint-3"}
TIMEOUT = 5


async def started(n_lanes: int = 1, n_trials: int = 1) -> Broker:
    broker = Broker(n_lanes)
    for lane in range(n_lanes):
        await broker.lane_ready(str(lane), {})
    for number in range(n_trials):
        await broker.submit(number, {"r": number}, None)
    return broker


def run(coroutine: Any) -> None:
    asyncio.run(asyncio.wait_for(coroutine, TIMEOUT))


def test_a_lane_waits_for_the_decision_on_its_report() -> None:
    async def scenario() -> None:
        broker = await started()
        assert await broker.next_job("0") == (0, {"r": 0}, None)
        report = asyncio.create_task(broker.report(0, REPORT, final=False))
        assert await broker.next_report(0) == REPORT
        await asyncio.sleep(0)
        assert not report.done()  # Tune has not decided yet
        asyncio.create_task(broker.next_report(0))  # asking for the next report lets it go on
        assert await report is False

    run(scenario())


def test_a_stopped_trial_frees_its_lane_for_the_next() -> None:
    async def scenario() -> None:
        broker = await started(n_trials=2)
        await broker.next_job("0")
        report = asyncio.create_task(broker.report(0, REPORT, final=False))
        await broker.next_report(0)
        await broker.stop(0)
        assert await report is True
        await broker.finish("0", 0, None)
        assert await broker.next_job("0") == (1, {"r": 1}, None)

    run(scenario())


def test_a_final_report_waits_for_nobody() -> None:
    async def scenario() -> None:
        broker = await started()
        await broker.next_job("0")
        assert await broker.report(0, REPORT, final=True) is False

    run(scenario())


def test_a_restarted_lane_gets_its_trial_back_from_its_checkpoint_but_not_for_ever() -> None:
    async def scenario() -> None:
        broker = await started(n_trials=2)
        await broker.next_job("0")
        asyncio.create_task(broker.report(0, REPORT, final=False))
        await broker.next_report(0)
        for _ in range(MAX_ATTEMPTS - 1):
            assert await broker.next_job("0") == (0, {"r": 0}, "checkpoint-3")
        assert await broker.next_job("0") == (1, {"r": 1}, None)
        assert "died 3 times in this trial" in (await broker.next_report(0))["failure"]

    run(scenario())


def test_a_failed_trial_says_why() -> None:
    async def scenario() -> None:
        broker = await started()
        await broker.next_job("0")
        await broker.finish("0", 0, "out of memory: made up")
        assert await broker.next_report(0) == {"failure": "out of memory: made up"}

    run(scenario())


def test_a_lost_lanes_trial_goes_to_another_lane() -> None:
    async def scenario() -> None:
        broker = await started(n_lanes=2)
        await broker.next_job("0")
        asyncio.create_task(broker.report(0, REPORT, final=False))
        await broker.next_report(0)
        await broker.lane_lost("0", "node died")
        assert await broker.next_job("1") == (0, {"r": 0}, "checkpoint-3")

    run(scenario())


def test_the_last_lost_lane_ends_every_trial_even_later_ones() -> None:
    async def scenario() -> None:
        broker = await started(n_lanes=2)
        await broker.next_job("0")
        await broker.lane_lost("0", "node died")
        await broker.lane_lost("1", "node died too")
        assert await broker.next_report(0) == {"no_lane": "node died"}
        await broker.submit(1, {}, None)
        assert "no_lane" in await broker.next_report(1)

    run(scenario())


def test_closing_wakes_every_waiting_lane() -> None:
    async def scenario() -> None:
        broker = await started(n_lanes=3, n_trials=0)
        waiting = [asyncio.create_task(broker.next_job(str(lane))) for lane in range(3)]
        await asyncio.sleep(0)
        await broker.close()
        assert await asyncio.gather(*waiting) == [None, None, None]

    run(scenario())
