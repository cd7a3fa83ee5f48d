"""Stands between light Tune trials and resident lanes: hands trials to lanes, reports to Tune, decisions back.

One asynchronous Ray actor; nothing heavy is imported here. A trial's way through it:

    Tune trial --submit--> queue --next_job--> lane --report--> next_report --> Tune trial
                                                 ^--- continue (the next next_report) or stop ---'
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

MAX_ATTEMPTS = 3
"""How often a lane's process may die in one trial before the trial counts as failed."""


@dataclass
class Job:
    """One trial as the broker sees it."""

    number: int
    assignment: dict[str, Any]
    resume_from: str | None
    reports: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    decision: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: bool = False
    attempts: int = 0
    failed: bool = False


class Broker:
    """Runs as an actor; all methods are coroutines, so that a waiting caller blocks nobody else."""

    def __init__(self, n_lanes: int) -> None:
        self._n_lanes = n_lanes
        self._jobs: dict[int, Job] = {}
        self._queue: asyncio.Queue[int | None] = asyncio.Queue()
        self._on_lane: dict[str, int] = {}
        self._lanes: dict[str, dict[str, Any]] = {}
        self._closed = False

    # Tune's side

    async def submit(self, number: int, assignment: dict[str, Any], resume_from: str | None) -> None:
        """Queues a trial for the next free lane."""
        self._jobs[number] = Job(number, assignment, resume_from)
        await self._queue.put(number)
        await self._tell_if_no_lane()

    async def next_report(self, number: int) -> dict[str, Any]:
        """Waits for the trial's next report; asking for it lets the trial go on after the one before.

        The last report of a failed trial is `{"failure": reason}`, and that of one left without a lane
        `{"no_lane": reason}`.
        """
        job = self._jobs[number]
        job.decision.set()
        return await job.reports.get()

    async def stop(self, number: int) -> None:
        """The trial has ended for Tune; its lane shall take the next one."""
        if job := self._jobs.get(number):
            job.stopped = True
            job.decision.set()

    # the lanes' side

    async def lane_ready(self, lane: str, facts: dict[str, Any]) -> None:
        """A lane's base is resident; called again after a restart."""
        self._lanes[lane] = facts

    async def next_job(self, lane: str) -> tuple[int, dict[str, Any], str | None] | None:
        """Waits for a trial: number, assignment, checkpoint. None: the search is over.

        A restarted lane gets the trial back that it died in, from its last checkpoint.
        """
        job = self._jobs.get(self._on_lane.get(lane, -1))
        if job is not None and not job.stopped:
            if job.attempts < MAX_ATTEMPTS:
                job.attempts += 1
                return job.number, job.assignment, job.resume_from
            await self._fail(job, f"the lane's process died {job.attempts} times in this trial; out of memory?")
        while not self._closed:
            number = await self._queue.get()
            if number is None:
                break
            job = self._jobs[number]
            if not job.stopped and not job.failed:
                job.attempts = 1
                self._on_lane[lane] = number
                return number, job.assignment, job.resume_from
        await self._queue.put(None)  # wakes the next waiting lane
        return None

    async def report(self, number: int, report: dict[str, Any], *, final: bool) -> bool:
        """Hands a report to Tune and waits for its answer: whether to stop. A final one needs no answer."""
        job = self._jobs[number]
        job.resume_from = report["checkpoint"]
        job.decision.clear()
        await job.reports.put(report)
        if not final and not job.stopped:
            await job.decision.wait()
        return job.stopped

    async def finish(self, lane: str, number: int, failure: str | None) -> None:
        """The trial has left its lane."""
        self._on_lane.pop(lane, None)
        if failure is not None:
            await self._fail(self._jobs[number], failure)

    # the driver's side

    async def lanes(self) -> dict[str, dict[str, Any]]:
        """Facts of each lane that has come up; `lost` says why one is gone."""
        return self._lanes

    async def lane_lost(self, lane: str, reason: str) -> None:
        """A lane is gone for good: its trial goes to another, or fails with the last one."""
        self._lanes.setdefault(lane, {})["lost"] = reason
        number = self._on_lane.pop(lane, None)
        if number is not None and not self._jobs[number].stopped:
            await self._queue.put(number)
        await self._tell_if_no_lane()

    async def close(self) -> None:
        """Ends the search: lanes that wait for a trial return."""
        self._closed = True
        await self._queue.put(None)

    async def _tell_if_no_lane(self) -> None:
        lost = [facts["lost"] for facts in self._lanes.values() if "lost" in facts]
        if len(lost) == self._n_lanes:
            for job in self._jobs.values():
                if not job.stopped:
                    await job.reports.put({"no_lane": lost[0]})

    async def _fail(self, job: Job, reason: str) -> None:
        job.failed = True
        await job.reports.put({"failure": reason})
