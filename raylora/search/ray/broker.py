"""Carries news from lanes to the controller and orders back: a mailbox, which decides nothing.

One asynchronous Ray actor on the driver's node. A lane asks for its orders ahead of time, so that one that trains need
not wait for them:

    lane --post--> broker --news--> Tune trial --result--> controller --deliver--> broker --orders--> lane
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from raylora.search.messages import Batch, Gone, Lost, Order, Pulse


@dataclass
class _Mailbox:
    """News and orders under way between one lane and the controller."""

    process: int = 0
    """Counts the lane's processes; one that another has followed gets no orders."""

    answered: int = 0
    """Last batch of this process that the controller has answered."""

    orders: list[Order] = field(default_factory=list)
    news: list[Batch] = field(default_factory=list)
    """Batches that the controller may not have seen yet."""

    n_seen: int = 0
    """Batches that it has seen, over all processes."""

    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    """Wakes those who wait at this mailbox. One for all mailboxes would wake every lane at each message."""


class Broker:
    """Mailboxes of all lanes. All methods are coroutines, so that a waiting caller blocks nobody else."""

    def __init__(self) -> None:
        self._boxes: dict[str, _Mailbox] = {}
        self._pulses: dict[str, Pulse] = {}
        self._closed = False

    # the lanes' side

    async def connect(self, lane: str) -> int:
        """Return the number of a new process of a lane; orders that the last one has not taken are dropped."""
        box = self._box(lane)
        box.process, box.answered, box.orders = box.process + 1, 0, []
        await self._wake(box)
        return box.process

    async def post(self, batch: Batch) -> None:
        """Take a batch of news."""
        box = self._box(batch.lane)
        box.news.append(batch)
        await self._wake(box)

    async def orders(self, lane: str, process: int, answered: int) -> tuple[int, list[Order]] | None:
        """Wait for orders, or for the answer to a batch.

        Args:
            lane: name of the lane.
            process: number of the asking process.
            answered: last batch whose answer the process has.

        Returns:
            The last batch that was answered, and all new orders; None once there is nothing more to do.
        """
        box = self._box(lane)
        await self._wait(box, lambda: box.process != process or bool(box.orders) or box.answered > answered)
        if self._closed or box.process != process:
            return None
        orders, box.orders = box.orders, []
        return box.answered, orders

    async def end(self, lane: str, news: Gone | Lost) -> None:
        """Say for a lane that its process has ended; one that lives on beyond a broken network gets no more orders."""
        process = await self.connect(lane)
        await self.post(Batch(lane, process, 1, [news]))

    async def beat(self, lane: str, pulse: Pulse) -> None:
        """Keep a lane's newest pulse; nobody waits for it."""
        self._pulses[lane] = pulse

    # the controller's side

    async def pulses(self) -> dict[str, Pulse]:
        """Return the newest pulse of each lane."""
        return dict(self._pulses)

    async def news(self, lane: str, n_seen: int) -> tuple[int, list[Batch]] | None:
        """Wait for batches of a lane.

        Args:
            lane: name of the lane.
            n_seen: batches that the asker has handed on; they are forgotten. A new asker says 0 and gets the others.

        Returns:
            Number of batches seen with these, and the batches; None once the search is over.
        """
        box = self._box(lane)
        del box.news[: max(0, n_seen - box.n_seen)]
        box.n_seen = max(box.n_seen, n_seen)
        await self._wait(box, lambda: bool(box.news))
        return None if self._closed else (box.n_seen + len(box.news), list(box.news))

    async def deliver(self, orders: dict[str, list[Order]], processes: dict[str, int], answer: Batch) -> None:
        """Put orders into mailboxes, and note that a batch was answered.

        Args:
            orders: lane -> orders.
            processes: lane -> process that they are meant for.
            answer: the batch.
        """
        for lane, new in orders.items():
            box = self._box(lane)
            if processes[lane] == box.process:
                box.orders += new
        box = self._box(answer.lane)
        if answer.process == box.process:
            box.answered = max(box.answered, answer.round)
        for lane in orders.keys() | {answer.lane}:
            await self._wake(self._box(lane))

    async def close(self) -> None:
        """End the search: every waiting caller returns."""
        self._closed = True
        for box in list(self._boxes.values()):
            await self._wake(box)

    def _box(self, lane: str) -> _Mailbox:
        return self._boxes.setdefault(lane, _Mailbox())

    async def _wait(self, box: _Mailbox, ready: Callable[[], bool]) -> None:
        async with box.changed:
            await box.changed.wait_for(lambda: self._closed or ready())

    @staticmethod
    async def _wake(box: _Mailbox) -> None:
        async with box.changed:
            box.changed.notify_all()
