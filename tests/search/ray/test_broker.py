"""The mailbox, without Ray: who waits for whom, and what a dead process leaves behind."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from raylora.search.messages import Batch, Leave, Lost
from raylora.search.ray.broker import Broker, _Mailbox

TIMEOUT = 5


def run(coroutine: Any) -> None:
    asyncio.run(asyncio.wait_for(coroutine, TIMEOUT))


async def deliver(broker: Broker, answer: Batch, *orders: Leave) -> None:
    await broker.deliver({answer.lane: list(orders)}, {answer.lane: answer.process}, answer)


def test_a_lane_waits_for_the_answer_to_its_news() -> None:
    async def scenario() -> None:
        broker = Broker()
        assert await broker.connect("0") == 1
        batch = Batch("0", 1, 1)
        await broker.post(batch)
        assert await broker.news("0", 0) == (1, [batch])
        waiting = asyncio.create_task(broker.orders("0", 1, 0))
        await asyncio.sleep(0)
        assert not waiting.done()
        await deliver(broker, batch, Leave(3))
        assert await waiting == (1, [Leave(3)])

    run(scenario())


def test_an_empty_answer_is_an_answer() -> None:
    async def scenario() -> None:
        broker = Broker()
        await broker.connect("0")
        await deliver(broker, Batch("0", 1, 1))
        assert await broker.orders("0", 1, 0) == (1, [])

    run(scenario())


def test_orders_come_without_news_too() -> None:
    async def scenario() -> None:
        broker = Broker()
        await broker.connect("0")
        await broker.connect("1")
        waiting = asyncio.create_task(broker.orders("1", 1, 0))
        await broker.deliver({"1": [Leave(0)]}, {"1": 1}, Batch("0", 1, 1))
        assert await waiting == (0, [Leave(0)])

    run(scenario())


def test_news_that_was_not_handed_on_is_given_to_the_next_asker() -> None:
    async def scenario() -> None:
        broker = Broker()
        first, second = Batch("0", 1, 1), Batch("0", 1, 2)
        await broker.post(first)
        assert await broker.news("0", 0) == (1, [first])
        await broker.post(second)
        assert await broker.news("0", 1) == (2, [second])
        assert await broker.news("0", 0) == (2, [second])  # the asker died: another one starts from what is left

    run(scenario())


def test_a_dead_process_gets_nothing_that_is_meant_for_the_next() -> None:
    async def scenario() -> None:
        broker = Broker()
        await broker.connect("0")
        stale = asyncio.create_task(broker.orders("0", 1, 0))
        await asyncio.sleep(0)
        assert await broker.connect("0") == 2
        assert await stale is None
        await deliver(broker, Batch("0", 1, 1), Leave(0))  # decided before the process died
        await deliver(broker, Batch("0", 2, 1), Leave(1))
        assert await broker.orders("0", 2, 0) == (1, [Leave(1)])

    run(scenario())


def test_a_lost_lane_is_news() -> None:
    async def scenario() -> None:
        broker = Broker()
        await broker.connect("0")
        await broker.end("0", Lost("node died"))
        assert await broker.news("0", 0) == (1, [Batch("0", 2, 1, [Lost("node died")])])

    run(scenario())


def test_closing_wakes_everybody() -> None:
    async def scenario() -> None:
        broker = Broker()
        for lane in "012":
            await broker.connect(lane)
        waiting = [asyncio.create_task(broker.orders(lane, 1, 0)) for lane in "012"]
        waiting += [asyncio.create_task(broker.news(lane, 0)) for lane in "012"]
        await asyncio.sleep(0)
        await broker.close()
        assert await asyncio.gather(*waiting) == [None] * 6

    run(scenario())


@pytest.mark.parametrize("n_lanes", [4, 64])
def test_a_message_wakes_only_those_whom_it_concerns(n_lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    wait = Broker._wait

    async def counted(broker: Broker, box: _Mailbox, ready: Callable[[], bool]) -> None:
        def look() -> bool:
            nonlocal looks
            looks += 1
            return ready()

        await wait(broker, box, look)

    async def scenario() -> None:
        nonlocal looks
        broker = Broker()
        names = [str(index) for index in range(n_lanes)]
        for lane in names:
            await broker.connect(lane)
        waiting = [asyncio.create_task(broker.orders(lane, 1, 0)) for lane in names]
        waiting += [asyncio.create_task(broker.news(lane, 0)) for lane in names]
        await asyncio.sleep(0)
        looks = 0
        await broker.post(Batch("0", 1, 1))
        await waiting[n_lanes]
        assert looks == 2  # of lane 0: its process, and who asks for its news
        await broker.close()
        await asyncio.gather(*waiting)

    monkeypatch.setattr(Broker, "_wait", counted)
    run(scenario())
