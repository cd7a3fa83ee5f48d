"""Successive halving by hand: who is promoted when."""

import math

from raylora.search.halving import Halving


def at_first_rung(halving: Halving, losses: list[float], first: int = 0) -> None:
    for number, loss in enumerate(losses, first):
        halving.enter(number)
        halving.report(number, loss)


def promotions(halving: Halving) -> list[int]:
    """Promote whoever may go on, and say who did."""
    found = []
    while (promotion := halving.promotable()) is not None:
        halving.enter(*promotion)
        found.append(promotion[0])
    return found


def test_in_step_nobody_goes_on_before_all_have_come() -> None:
    halving = Halving(3, 3, synchronous=True)
    at_first_rung(halving, [9, 8, 7, 6, 5, 4, 3, 2])
    halving.enter(8)
    assert promotions(halving) == []
    halving.report(8, 1.0)
    assert promotions(halving) == []  # a tenth might yet come
    halving.close()
    assert promotions(halving) == [8, 7, 6]
    assert halving.out() == []  # all three might yet fail, and the next best be needed
    halving.report(8, 0.5)
    assert halving.out() == [0, 1, 2, 3, 4, 5]
    halving.report(7, 0.4)
    assert promotions(halving) == []
    halving.report(6, 0.6)
    assert promotions(halving) == [7]
    assert not {6, 8} & set(halving.out())  # 7 might yet fail
    halving.report(7, 0.3)
    assert {6, 8} <= set(halving.out())


def test_asynchronously_the_best_third_goes_on_at_once() -> None:
    # arXiv:1810.05934, algorithm 2: from each rung the best 1/3 of those that came so far
    halving = Halving(3, 3, synchronous=False)
    at_first_rung(halving, [5.0, 4.0])
    assert promotions(halving) == []
    halving.enter(2)
    halving.report(2, 6.0)
    assert halving.promotable(2) is None
    assert promotions(halving) == [1]
    at_first_rung(halving, [3.0, 7.0, 8.0], first=3)
    assert halving.promotable(3) == (3, 1)
    assert halving.promotable(0) is None
    assert halving.out() == []  # more may come


def test_a_promotion_nearer_the_full_budget_comes_first() -> None:
    halving = Halving(3, 2, synchronous=False)
    at_first_rung(halving, [1.0, 2.0, 3.0, 4.0])
    assert promotions(halving) == [0, 1]
    halving.report(0, 0.9)
    halving.report(1, 0.8)
    halving.enter(4)
    halving.report(4, 0.5)
    halving.enter(5)
    halving.report(5, 0.6)
    assert promotions(halving) == [1, 4, 5]  # of two at the second rung 1; of six at the first 4, 5 and 0


def test_a_search_smaller_than_the_reduction_factor_still_finishes_one() -> None:
    for synchronous in (True, False):
        halving = Halving(3, 3, synchronous=synchronous)
        at_first_rung(halving, [2.0, 1.0])
        halving.close()
        assert promotions(halving) == [1]
        halving.report(1, 1.0)
        assert promotions(halving) == [1]


def test_the_last_rung_before_the_end_lets_several_through() -> None:
    halving = Halving(3, 3, synchronous=True, finalists=3)
    at_first_rung(halving, [9, 8, 7, 6, 5, 4, 3, 2, 1])
    halving.close()
    assert promotions(halving) == [8, 7, 6]
    for number, loss in ((6, 0.6), (7, 0.7)):
        halving.report(number, loss)
    assert promotions(halving) == []
    halving.fail(8)
    assert promotions(halving) == [6, 7]


def test_a_failed_trial_holds_nobody_up_and_is_never_promoted() -> None:
    halving = Halving(2, 3, synchronous=True)
    at_first_rung(halving, [1.0, 2.0])
    halving.enter(2)
    halving.close()
    assert promotions(halving) == []
    halving.fail(2)
    assert promotions(halving) == [0]
    halving.fail(0)
    assert promotions(halving) == [1]  # the search still ends with a finished trial


def test_a_diverged_loss_or_a_withdrawn_trial_is_never_promoted() -> None:
    halving = Halving(2, 2, synchronous=True)
    at_first_rung(halving, [math.inf, math.inf, 3.0, 2.0])
    halving.withdraw(3)
    halving.close()
    assert promotions(halving) == [2]


def test_finalists_that_fail_are_replaced_by_the_next_best() -> None:
    halving = Halving(2, 3, synchronous=True, finalists=2)
    at_first_rung(halving, [1.0, 2.0, 3.0, 4.0])
    halving.close()
    assert promotions(halving) == [0, 1]
    halving.fail(0)
    assert promotions(halving) == [2]
    halving.report(1, 0.5)
    halving.fail(2)
    assert halving.out() == []
    assert promotions(halving) == [3]
    halving.report(3, 0.6)
    assert promotions(halving) == halving.out() == []
