"""Intervals: wide where rows differ, honest where they all agree."""

import pytest

from raylora.evaluate.bootstrap import mean_interval, score_intervals, share_interval
from raylora.evaluate.scores import score_rows


def test_an_interval_is_as_wide_as_the_normal_approximation_says() -> None:
    # standard error of 50 of 100 is .05, so 95 % lie within .402 and .598; a draw moves by .01, an end by some of them
    low, high = mean_interval([0.0, 1.0] * 50)
    assert low == pytest.approx(0.402, abs=0.02)
    assert high == pytest.approx(0.598, abs=0.02)


def test_rows_that_agree_have_no_width_and_rows_without_weight_do_not_count() -> None:
    assert mean_interval([3.0, 3.0, 9.0], [1.0, 5.0, 0.0]) == pytest.approx([3.0, 3.0])
    assert mean_interval([1.0], [0.0]) == [0.0, 0.0]


def test_a_share_that_all_prompts_agree_on_is_not_called_certain() -> None:
    assert share_interval([0.0] * 30) == [0.0, pytest.approx(0.1)]
    assert share_interval([1.0] * 30) == [pytest.approx(0.9), 1.0]
    assert share_interval([1.0]) == [0.0, 1.0]


def test_every_score_of_a_corpus_lies_in_its_interval() -> None:
    references = [[f"the {word} sat on the mat today"] for word in ("cat", "dog", "cow", "hen")]
    texts = [accepted[0] for accepted in references[:2]] + ["something else", "the hen sat"]
    rows = score_rows(texts, references)
    intervals = score_intervals(texts, references, [*({**row, "tool_call_match": 1.0} for row in rows[:3]), rows[3]])
    assert set(intervals) == {"exact_match", "bleu", "chrf", "rouge_l", "tool_call_match"}
    assert intervals["exact_match"][0] < 0.5 < intervals["exact_match"][1]
    assert 0 <= intervals["bleu"][0] < intervals["bleu"][1] <= 100
    assert intervals["tool_call_match"] == [0.0, 1.0]  # 1 - 3 / 3: three answers with calls say little


def test_answers_without_a_word_in_common_have_an_interval_too() -> None:
    texts, references = ["xx yy"] * 3, [["a b"]] * 3
    intervals = score_intervals(texts, references, score_rows(texts, references))
    assert intervals["bleu"] == intervals["chrf"] == [0.0, 0.0]


def test_answers_of_which_some_draws_share_nothing_with_their_references() -> None:
    intervals = score_intervals(["the cat", "xx", "yy"], [["the cat"], ["qqq"], ["zzz"]], [{}, {}, {}])
    low, high = intervals["chrf"]
    assert 0.0 <= low < high <= 100.0
