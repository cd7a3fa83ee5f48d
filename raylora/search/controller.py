"""Owns every trial of a search, from its proposal to its end: lanes send news, the controller answers with orders.

It knows nothing of Ray. All that it decides is an event in the log, and on disk before a lane is told. A search that
was killed goes on from its log as if it had not been.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable

from raylora.config.schema import SearchConfig
from raylora.run.events import (
    Event,
    EventLog,
    Failed,
    Finished,
    GivenBack,
    Interrupted,
    LaneLost,
    LaneUp,
    Paused,
    Promoted,
    Proposed,
    Reported,
    SessionStarted,
    Started,
    Stopped,
)
from raylora.run.state import Lane, SearchState
from raylora.run.trial_row import TrialRow
from raylora.search.halving import Halving
from raylora.search.messages import Batch, Failure, Gone, Leave, Lost, Order, Ready, Report, Return, Start
from raylora.search.sampler import Sampler

MAX_DEATHS = 3
"""Times that a lane's process may die under a trial before the trial counts as failed."""

MAX_MACHINE_FAULTS = 3
"""Faults of disk, files or devices, without a report between them, that end the search."""


class SearchController:
    """Decisions of one search.

    Args:
        config: settings of the search.
        rungs: optimizer steps at which trials are compared, ascending; the last is the full budget.
        log: receives the events.
        events: what the log holds already.
        n_lanes: lanes that will come up.
        clock: gives seconds, for `search.time_budget_minutes`.
    """

    def __init__(
        self,
        config: SearchConfig,
        rungs: list[int],
        log: EventLog,
        *,
        events: Iterable[Event] = (),
        n_lanes: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._search, self._n_trials, self._rungs = config.search, config.n_trials(), rungs
        self._log, self._n_lanes, self._clock = log, n_lanes, clock
        self._began = clock()
        self._halving = Halving(
            len(rungs),
            config.search.reduction_factor,
            synchronous=config.search.scheduler == "halving",
            finalists=config.search.finalists,
        )
        self.state = SearchState()
        self._sampler = Sampler(config, self.state)
        self._listeners: list[Callable[[Event], None]] = []
        self._answered: dict[tuple[str, int], int] = {}
        """(lane, process) -> its last batch that was answered."""

        self._orders: dict[str, list[Order]] = defaultdict(list)
        self.error: str | None = None
        """Why the search cannot go on, once it cannot."""

        self.done = False
        """True once nothing is left to train."""

        for event in events:
            self._fold(event)

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call a function with each event to come, after it has changed the state."""
        self._listeners.append(listener)

    @property
    def over(self) -> bool:
        """True if no lane needs to train any more."""
        return self.done or self.error is not None

    def begin(self, host: str, pid: int) -> None:
        """Take up the search; sets `done` if there is nothing left to train.

        Args:
            host: name of this machine.
            pid: id of this process.
        """
        self._record(SessionStarted(self._n_trials, host, pid))
        for number in sorted(self.state.undecided):
            self._decide(number)
        self._stop_who_is_out()
        self.done = self._next(self.state.numbers("queued")) is None
        self._log.flush()

    def handle(self, batch: Batch) -> dict[str, list[Order]]:
        """Take in what a lane says, and decide what lanes do next.

        Reports of one batch are decided in the order of their trials' numbers, once all of them are known. A batch that
        was answered before is ignored, and so is what it says of a segment that has ended.

        Returns:
            Orders for each lane that has any. The events behind them are on disk.
        """
        if batch.round <= self._answered.get((batch.lane, batch.process), 0) or self._is_stale(batch):
            return {}
        self._answered[batch.lane, batch.process] = batch.round
        self._orders = defaultdict(list)
        reported = sorted(
            (news for news in batch.news if isinstance(news, Report) and self._is_current(news.number, news.segment)),
            key=lambda report: report.number,
        )
        for report in reported:
            self._record(Reported(report.number, report.segment, vars(report.metrics)))
        for news in batch.news:
            match news:
                case Ready():
                    self._lane_is_up(batch, news)
                case Gone() if self._is_up(batch.lane):
                    self._lane_is_down(batch.lane, news.reason, blames_trials=not news.node_lost)
                case Lost():
                    self._record(LaneLost(batch.lane, news.reason, for_good=True, blames_trials=False))
                case Failure() if self._is_current(news.number, news.segment):
                    self._record(Failed(news.number, news.reason))
                case Return():
                    self._take_back(news)
        for report in reported:
            if not self._decide(report.number):
                self._orders[batch.lane].append(Leave(report.number))
        self._go_on()
        self._log.flush()
        return dict(self._orders)

    def interrupt(self) -> None:
        """Note that the user ended the session, who will not wait for a disk."""
        self._log.give_up_soon()
        self._record(Interrupted())
        self._log.flush()

    def _is_stale(self, batch: Batch) -> bool:
        """Return True for a process that another one of its lane has followed."""
        lane = self.state.lanes.get(batch.lane)
        return lane is not None and batch.process < lane.process

    def _is_current(self, number: int, segment: int) -> bool:
        row = self.state.trials[number]
        return row.state == "running" and row.segment == segment

    def _lane_is_up(self, batch: Batch, news: Ready) -> None:
        if self._is_up(batch.lane):  # nobody has told that its last process ended
            same_node = self.state.lanes[batch.lane].facts.get("node") == news.facts.get("node")
            reason = "its process ended" if same_node else "its node was lost"
            self._lane_is_down(batch.lane, reason, blames_trials=same_node)
        self._record(LaneUp(batch.lane, batch.process, news.slots, news.facts))

    def _lane_is_down(self, name: str, reason: str, *, blames_trials: bool) -> None:
        self._record(LaneLost(name, reason, for_good=False, blames_trials=blames_trials))
        for number in sorted(self.state.lanes[name].suspects):
            if self.state.deaths.get(number, 0) >= MAX_DEATHS:
                self._record(Failed(number, f"the process of its lane died {MAX_DEATHS} times while training it"))

    def _is_up(self, name: str) -> bool:
        lane = self.state.lanes.get(name)
        return lane is not None and lane.up

    def _take_back(self, news: Return) -> None:
        for number, checkpoint in sorted(news.checkpoints.items()):
            if self._is_current(number, news.segments[number]):
                self._record(GivenBack(number, news.reason, checkpoint, news.slots, news.machine_fault))
        if self.state.machine_faults >= MAX_MACHINE_FAULTS:
            self.error = f"{news.reason}; mend it and go on with --resume"

    def _decide(self, number: int) -> bool:
        """Return True if a trial that has reported stays on its lane and trains to its next rung."""
        row = self.state.trials[number]
        if row.step >= self._rungs[-1]:
            self._record(Finished(number))
            return False
        promotion = self._halving.promotable(number)
        if promotion is None:
            self._record(Paused(number))
            return False
        self._record(Promoted(*promotion))
        lane = self._lane_of(row)
        if lane is not None and lane.suspects:
            self._record(GivenBack(number, "its lane trains the others alone first", None))
            return False
        return True

    def _lane_of(self, row: TrialRow) -> Lane | None:
        lane = self.state.lanes.get(row.lane or "")
        return lane if lane is not None and row.number in lane.trials else None

    def _go_on(self) -> None:
        """Fill free slots, stop who cannot be promoted any more, and see whether the search is over."""
        lanes = self.state.lanes
        lost = [lane.lost for lane in lanes.values() if lane.lost is not None]
        if len(lost) >= self._n_lanes:
            self.error = f"no lane is left: {lost[0]}; mend it and go on with --resume"
        if self.error is not None:
            return
        while (choice := self._choose()) is not None:
            self._start(*choice)
        self._stop_who_is_out()
        if not self.state.numbers("queued", "running") and any(lane.lost is None for lane in lanes.values()):
            self.done = True

    def _choose(self) -> tuple[str, int] | None:
        """Return a lane with a free slot and the trial that gets it; the emptiest lane comes first."""
        lanes = self.state.lanes
        queued = self.state.numbers("queued")
        suspects = set().union(*(lane.suspects for lane in lanes.values()))
        # a lane that is down may never find room again, so that others take its suspects when they are idle
        stranded = set().union(*(lane.suspects for lane in lanes.values() if not lane.up))
        up = [name for name, lane in lanes.items() if lane.up]
        is_asked = False  # what `_next` says holds for every lane
        for name in sorted(up, key=lambda name: (len(lanes[name].trials), len(name), name)):
            lane = lanes[name]
            number = None
            if lane.suspects:
                number = None if lane.trials else min(queued & lane.suspects, default=None)
            elif len(lane.trials) < lane.slots and not is_asked:
                number, is_asked = self._next(queued - suspects), True
            if number is None and not lane.trials:
                number = min(queued & stranded, default=None)
            if number is not None:
                return name, number
        return None

    def _start(self, name: str, number: int) -> None:
        row, resume_from = self.state.trials[number], self.state.resume_from[number]
        rungs = self._rungs if row.repeat_of is None else self._rungs[-1:]
        self._record(Started(number, row.segment + 1, name, resume_from))
        self._orders[name].append(Start(number, row.segment + 1, row.assignment().model_dump(), rungs, resume_from))

    def _next(self, queued: set[int]) -> int | None:
        """Return the trial to train next: one that waits for a slot, promoted, new, or repeated."""
        if queued:
            return min(queued)
        number = self._promote()
        if number is None and self._has_proposals():
            return None if self.gave_up() else self._propose()
        if number is None:
            self._halving.close()
            number = self._promote()
        if number is None and not self.state.numbers("queued", "running"):
            number = self._repeat()
        return number

    def _promote(self) -> int | None:
        promotion = self._halving.promotable()
        if promotion is None:
            return None
        self._record(Promoted(*promotion))
        return promotion[0]

    def _has_proposals(self) -> bool:
        budget = self._search.time_budget_minutes
        out_of_time = budget is not None and self._clock() - self._began > 60 * budget
        return self.state.n_proposed() < self._n_trials and not self._sampler.exhausted() and not out_of_time

    def gave_up(self) -> bool:
        """Return True if the first trials have failed and none has reported yet: no more are proposed."""
        return not self.state.history and self.state.count("failed") >= self._search.max_initial_failures

    def _propose(self) -> int:
        number = len(self.state.trials)
        assignment, params = self._sampler.propose(number)
        self._record(Proposed(number, assignment.model_dump(), params, self._rungs[-1]))
        return number

    def _repeat(self) -> int | None:
        """Return the next of the best assignments with another seed."""
        for best in self.state.leaders(self._search.repeat_best):
            seeds = {run.seed for run in self.state.runs_of(best.number)}
            if len(seeds) <= self._search.repeats:
                number = len(self.state.trials)
                assignment = best.assignment().model_copy(update={"seed": max(seeds) + 1})
                self._record(Proposed(number, assignment.model_dump(), {}, self._rungs[-1], repeat_of=best.number))
                return number
        return None

    def _stop_who_is_out(self) -> None:
        for number in self._halving.out():
            self._record(Stopped(number, f"not promoted from step {self.state.trials[number].step}"))

    def _record(self, event: Event) -> None:
        event = self._log.append(event)
        self._fold(event)
        for listener in self._listeners:
            listener(event)

    def _fold(self, event: Event) -> None:
        self.state.apply(event)
        match event:
            case Proposed(repeat_of=None):
                self._halving.enter(event.number)
            case Reported() if self.state.trials[event.number].repeat_of is None:
                self._halving.report(event.number, event.metrics["eval_loss"])
            case Promoted():
                self._halving.enter(event.number, event.rung)
            case Failed():
                self._halving.fail(event.number)
            case Stopped():
                self._halving.withdraw(event.number)
