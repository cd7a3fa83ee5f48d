"""Decides which trials go on past a rung: successive halving, in step or asynchronously.

Weak trials are not stopped but paused, and may be promoted later; Ray's ASHA only stops (ray#44256).

Source: Li et al. 2018, "A System for Massively Parallel Hyperparameter Tuning", algorithm 1 (successive halving) and
algorithm 2 (ASHA) (arXiv:1810.05934).
"""

import math
from collections.abc import Collection


class Halving:
    """Which trials stand at which rung, and who is promoted.

    Args:
        n_rungs: rungs, the full budget among them.
        reduction_factor: of the trials at a rung, the best one in so many is promoted.
        synchronous: promote from a rung only when all trials that can reach it have.
        finalists: trials that are promoted to the full budget, at least, where so many come near it.
    """

    def __init__(self, n_rungs: int, reduction_factor: int, *, synchronous: bool, finalists: int = 1) -> None:
        self._factor, self._synchronous, self._finalists = reduction_factor, synchronous, finalists
        self._entered: list[set[int]] = [set() for _ in range(n_rungs)]
        """Trials that have been let onto the way to each rung."""

        self._losses: list[dict[int, float]] = [{} for _ in range(n_rungs)]
        """Loss of each trial that has left that way: at the rung, or infinity where it failed before."""

        self._withdrawn: set[int] = set()
        self._closed = False

    def enter(self, number: int, rung: int = 0) -> None:
        """A trial sets out for a rung, counted from 0."""
        self._entered[rung].add(number)

    def report(self, number: int, rung: int, loss: float) -> None:
        """A trial has reached a rung."""
        self._losses[rung][number] = loss

    def fail(self, number: int) -> None:
        """A trial will reach no further rung; it counts among the worst of the next one."""
        for entered, losses in zip(self._entered, self._losses, strict=True):
            if number in entered:
                losses.setdefault(number, math.inf)

    def withdraw(self, number: int) -> None:
        """A trial will not be promoted any more, though its losses count."""
        self._withdrawn.add(number)

    def close(self) -> None:
        """No new trials will come."""
        self._closed = True

    def promote(self, number: int | None = None, *, busy: Collection[int] = ()) -> int | None:
        """Lets a trial onto the way to its next rung: this one, or the best one nearest the full budget.

        Args:
            number: of the trial; None is any.
            busy: trials that cannot set out yet.

        Returns:
            Its number; None where this one, or no one, may go on yet.
        """
        for rung in reversed(range(len(self._entered) - 1)):
            for candidate in self._promotable(rung):
                if number in (None, candidate) and candidate not in busy:
                    self.enter(candidate, rung + 1)
                    return candidate
        return None

    def out(self) -> list[int]:
        """Paused trials that can no longer be promoted."""
        return [
            number
            for rung in range(len(self._entered) - 1)
            if self._complete(rung)
            for number in self._losses[rung].keys() - self._entered[rung + 1] - set(self._promotable(rung))
            if math.isfinite(self._losses[rung][number])
        ]

    def _promotable(self, rung: int) -> list[int]:
        """Trials at a rung that may go on now, best first."""
        losses, complete = self._losses[rung], self._complete(rung)
        if self._synchronous and not complete:
            return []
        n_best = len(losses) // self._factor
        if complete:
            # one at least: a search too small for its reduction factor still ends with finished trials
            n_best = max(n_best, self._finalists if rung == len(self._losses) - 2 else 1)
        best = sorted(losses, key=lambda number: (losses[number], number))[:n_best]
        gone = self._entered[rung + 1] | self._withdrawn
        return [number for number in best if number not in gone and math.isfinite(losses[number])]

    def _complete(self, rung: int) -> bool:
        """Whether nobody else can come to a rung."""
        if self._entered[rung] != self._losses[rung].keys():
            return False
        return self._closed if rung == 0 else self._complete(rung - 1) and not self._promotable(rung - 1)
