"""Stands between light Tune trials and resident lanes: hands trials to lanes, reports to Tune, decisions back.

One asynchronous Ray actor; nothing heavy is imported here. A trial's way through it, from one rung to the next:

    bookkeeper --submit--> queue --orders--> lane --report--> next_report --> Tune trial
                                              ^--- go_on (the next next_report) or leave (stop) ---'
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

MAX_DEATHS = 3
"""How often a lane's process may die under a trial before the trial counts as failed."""


@dataclass(frozen=True)
class Job:
    """What a lane must know to train a trial."""

    number: int
    assignment: dict[str, Any]
    rungs: list[int]
    resume_from: str | None = None


@dataclass(frozen=True)
class Order:
    """What a lane shall do with a trial: `start`, `go_on` past a rung, or `leave`."""

    what: str
    number: int
    job: Job | None = None


@dataclass
class _Trial:
    job: Job
    reports: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    lane: str | None = None
    at_rung: bool = False
    ended: bool = False
    deaths: int = 0
    """Of lanes under it since its last report. One that has seen any trains alone, to tell culprits from victims."""


@dataclass
class _Lane:
    facts: dict[str, Any] = field(default_factory=dict)
    slots: int = 0
    life: int = 0
    """Counts its processes: a request that a dead one left behind must not take orders meant for the next."""

    trials: set[int] = field(default_factory=set)
    orders: list[Order] = field(default_factory=list)


class Broker:
    """Runs as an actor; all methods are coroutines, so that a waiting caller blocks nobody else."""

    def __init__(self, n_lanes: int) -> None:
        self._n_lanes = n_lanes
        self._trials: dict[int, _Trial] = {}
        self._queue: deque[int] = deque()
        self._lanes: dict[str, _Lane] = {}
        self._closed = False
        self._news = asyncio.Condition()

    # Tune's side

    async def submit(self, job: Job) -> None:
        """Queues a trial for the next free place."""
        if job.number in self._trials:
            await self.stop(job.number)
        self._trials[job.number] = _Trial(job)
        self._queue.append(job.number)
        await self._tell_if_no_lane()
        await self._tell_lanes()

    async def next_report(self, number: int) -> dict[str, Any]:
        """Waits for the trial's next report; asking for it lets the trial go on after the one before.

        The last report of a failed trial is `{"failure": reason}`, and that of one left without a lane
        `{"no_lane": reason}`.
        """
        trial = self._trials[number]
        if trial.at_rung and trial.lane and trial.reports.empty():
            trial.at_rung = False
            self._lanes[trial.lane].orders.append(Order("go_on", number))
            await self._tell_lanes()
        return await trial.reports.get()

    async def stop(self, number: int) -> None:
        """The trial has ended for Tune, if only for now; its place shall go to the next one."""
        trial = self._trials.get(number)
        if trial is None or trial.ended:
            return
        trial.ended = True
        if trial.lane:
            self._lanes[trial.lane].orders.append(Order("leave", number))
            self._leave(trial)
        await self._tell_lanes()

    # the lanes' side

    async def lane_ready(self, name: str, facts: dict[str, Any]) -> int:
        """A lane's base is resident, with slots for `facts["slots"]` trials; called again after a restart.

        A restarted lane died under its trials: they go back to the front of the queue, to go on from their last
        checkpoint.

        Returns:
            The process's number, for `orders`.
        """
        lane = self._lanes.setdefault(name, _Lane())
        lane.life += 1
        lane.facts, lane.slots, lane.orders = facts, facts["slots"], []
        for number in sorted(lane.trials, reverse=True):
            trial = self._trials[number]
            trial.deaths += 1
            self._requeue(trial)
            if trial.deaths >= MAX_DEATHS:
                await self._fail(trial, f"the lane's process died {trial.deaths} times in this trial; out of memory?")
        await self._tell_lanes()
        return lane.life

    async def orders(self, name: str, life: int) -> list[Order] | None:
        """Waits until there is something for a lane to do. None: the search is over."""
        lane = self._lanes[name]
        async with self._news:
            while lane.life == life and not self._closed:
                if orders := self._take(name):
                    return orders
                await self._news.wait()
        return None

    async def report(self, number: int, report: dict[str, Any], *, final: bool) -> None:
        """Hands a report to Tune. The trial then waits at its rung, unless it was the final one."""
        trial = self._trials[number]
        if trial.ended:
            return
        trial.job = replace(trial.job, resume_from=report["checkpoint"])
        trial.deaths, trial.at_rung = 0, not final
        if final:
            trial.ended = True
            self._leave(trial)
        await trial.reports.put(report)
        await self._tell_lanes()

    async def fail(self, number: int, reason: str) -> None:
        """The trial has failed and left its lane."""
        trial = self._trials[number]
        if not trial.ended:
            await self._fail(trial, reason)
        await self._tell_lanes()

    async def give_back(self, name: str, checkpoints: dict[int, str | None]) -> None:
        """A lane has too many trials for its memory: these leave, to go on later or elsewhere, and it takes fewer."""
        lane = self._lanes[name]
        for number, checkpoint in sorted(checkpoints.items(), reverse=True):
            trial = self._trials[number]
            if not trial.ended:
                trial.job = replace(trial.job, resume_from=checkpoint)
                self._requeue(trial)
        lane.slots = max(1, len(lane.trials))
        await self._tell_lanes()

    # the driver's side

    async def lanes(self) -> dict[str, dict[str, Any]]:
        """Facts of each lane that has come up, with its slots as they are now; `lost` says why one is gone."""
        return {name: {**lane.facts, "slots": lane.slots} for name, lane in self._lanes.items()}

    async def lane_lost(self, name: str, reason: str) -> None:
        """A lane is gone for good: its trials go to others, or fail with the last one."""
        lane = self._lanes.setdefault(name, _Lane())
        lane.facts, lane.slots = {**lane.facts, "lost": reason}, 0
        for number in sorted(lane.trials, reverse=True):
            self._requeue(self._trials[number])
        await self._tell_if_no_lane()
        await self._tell_lanes()

    async def close(self) -> None:
        """Ends the search: lanes that wait for a trial return."""
        self._closed = True
        await self._tell_lanes()

    def _take(self, name: str) -> list[Order]:
        """A lane's orders, and as many starts as it has slots for."""
        lane = self._lanes[name]
        orders, lane.orders = lane.orders, []
        while self._queue and self._has_place(lane, self._trials[self._queue[0]]):
            trial = self._trials[self._queue.popleft()]
            if not trial.ended:
                trial.lane = name
                lane.trials.add(trial.job.number)
                orders.append(Order("start", trial.job.number, trial.job))
        return orders

    def _has_place(self, lane: _Lane, trial: _Trial) -> bool:
        if trial.ended or not lane.trials:
            return lane.slots > 0
        suspect = trial.deaths or any(self._trials[number].deaths for number in lane.trials)
        return len(lane.trials) < lane.slots and not suspect

    def _requeue(self, trial: _Trial) -> None:
        self._leave(trial)
        trial.at_rung = False
        if not trial.ended:
            self._queue.appendleft(trial.job.number)

    def _leave(self, trial: _Trial) -> None:
        if trial.lane:
            self._lanes[trial.lane].trials.discard(trial.job.number)
            trial.lane = None

    async def _fail(self, trial: _Trial, reason: str) -> None:
        trial.ended = True
        self._leave(trial)
        await trial.reports.put({"failure": reason})

    async def _tell_if_no_lane(self) -> None:
        lost = [lane.facts["lost"] for lane in self._lanes.values() if "lost" in lane.facts]
        if len(lost) == self._n_lanes:
            for trial in self._trials.values():
                if not trial.ended:
                    await trial.reports.put({"no_lane": lost[0]})

    async def _tell_lanes(self) -> None:
        async with self._news:
            self._news.notify_all()
