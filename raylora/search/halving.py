"""Decides which trials go on past a rung: successive halving, in step or asynchronously.

Weak trials are not stopped but paused, and may be promoted later; Ray's ASHA only stops (ray#44256).

Source: Li et al. 2018, "A System for Massively Parallel Hyperparameter Tuning", algorithm 1 (successive halving) and
algorithm 2 (ASHA) (arXiv:1810.05934).
"""

import math
from bisect import bisect_left, insort
from dataclasses import dataclass, field


@dataclass
class _Rung:
    """Trials on their way to one rung, and those that have reached it."""

    admitted: int = 0
    """Trials that may train to this rung."""

    losses: dict[int, float] = field(default_factory=dict)
    """Loss of each trial at this rung; infinite for one that failed on its way here."""

    ranking: list[tuple[float, int]] = field(default_factory=list)
    """(loss, number) of all of them, lowest first."""

    waiting: list[tuple[float, int]] = field(default_factory=list)
    """(loss, number) of the trials of finite loss that were neither promoted nor withdrawn, lowest first."""

    failed: int = 0

    @property
    def in_flight(self) -> int:
        """Trials that are still on their way."""
        return self.admitted - len(self.losses)

    def reach(self, number: int, loss: float) -> None:
        self.losses[number] = loss
        insort(self.ranking, (loss, number))
        if math.isfinite(loss):
            insort(self.waiting, (loss, number))
        else:
            self.failed += 1

    def place(self, number: int) -> int | None:
        """Return the index in `waiting` of a trial that has reached the rung; None if it does not wait."""
        entry = (self.losses[number], number)
        index = bisect_left(self.waiting, entry)
        return index if self.waiting[index : index + 1] == [entry] else None

    def leave(self, number: int) -> None:
        index = self.place(number)
        if index is not None:
            del self.waiting[index]


class Halving:
    """Trials at each rung, and who is promoted.

    Each call costs the logarithm of the number of trials.

    Args:
        n_rungs: number of rungs, the full budget among them.
        reduction_factor: the best trial of so many at a rung is promoted.
        synchronous: promote from a rung only when all trials that can reach it have.
        finalists: trials that reach the full budget, at least, where so many reach the rung before it.
    """

    def __init__(self, n_rungs: int, reduction_factor: int, *, synchronous: bool, finalists: int = 1) -> None:
        self._factor, self._synchronous, self._finalists = reduction_factor, synchronous, finalists
        self._rungs = [_Rung() for _ in range(n_rungs)]
        self._on_way_to: dict[int, int] = {}
        """Trial -> rung that it trains to; a trial that waits at a rung is not here."""

        self._closed = False

    def enter(self, number: int, rung: int = 0) -> None:
        """Admit a trial to a rung, counted from 0."""
        self._rungs[rung].admitted += 1
        self._on_way_to[number] = rung
        if rung:
            self._rungs[rung - 1].leave(number)

    def report(self, number: int, loss: float) -> None:
        """Note that a trial has reached the rung it was on its way to."""
        self._rungs[self._on_way_to.pop(number)].reach(number, loss)

    def fail(self, number: int) -> None:
        """Note that a trial will reach no further rung; it ranks last at the next one."""
        if number in self._on_way_to:
            self.report(number, math.inf)

    def withdraw(self, number: int) -> None:
        """Never promote this trial, though its losses count."""
        for rung in self._rungs:
            if number in rung.losses:
                rung.leave(number)

    def close(self) -> None:
        """Note that no new trials will come."""
        self._closed = True

    def promotable(self, number: int | None = None) -> tuple[int, int] | None:
        """Return (number, rung) of a trial that may go on, and the rung that it goes to.

        Args:
            number: ask for this trial only; None asks for the best one nearest the full budget.
        """
        for index in reversed(range(len(self._rungs) - 1)):
            rung = self._rungs[index]
            if number is None:
                if rung.waiting and self._may_go_on(index, rung.waiting[0]):
                    return rung.waiting[0][1], index + 1
            elif number in rung.losses:
                place = rung.place(number)
                return (
                    (number, index + 1) if place is not None and self._may_go_on(index, rung.waiting[place]) else None
                )
        return None

    def out(self) -> list[int]:
        """Return the waiting trials that can no longer be promoted, in the order of their numbers."""
        numbers = []
        for index, rung in enumerate(self._rungs[:-1]):
            arrived = self._rungs[index + 1]
            secured = len(arrived.losses) - arrived.failed
            if rung.waiting and self._complete(index) and secured >= self._needed(index):
                numbers += [number for loss, number in rung.waiting if not self._may_go_on(index, (loss, number))]
        return sorted(numbers)

    def _may_go_on(self, index: int, entry: tuple[float, int]) -> bool:
        rung, complete = self._rungs[index], self._complete(index)
        if self._synchronous and not complete:
            return False
        if bisect_left(rung.ranking, entry) < len(rung.ranking) // self._factor:
            return True
        # a search too small for its reduction factor still ends with finished trials, whoever fails on the way
        following = self._rungs[index + 1]
        return complete and entry == rung.waiting[0] and following.admitted - following.failed < self._needed(index)

    def _needed(self, index: int) -> int:
        """Trials that go on from a complete rung, at least."""
        return self._finalists if index == len(self._rungs) - 2 else 1

    def _complete(self, index: int) -> bool:
        """Return True if no further trial can come to this rung."""
        if self._rungs[index].in_flight:
            return False
        if index == 0:
            return self._closed
        before = self._rungs[index - 1]
        return self._complete(index - 1) and not (before.waiting and self._may_go_on(index - 1, before.waiting[0]))
