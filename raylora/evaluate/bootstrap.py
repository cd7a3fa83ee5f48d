"""Turns the scores of single answers into 95 % intervals, by drawing prompts anew (bootstrap)."""

import json

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.chrf import CHRFScore

from raylora.evaluate.scores import reference_columns

N_DRAWS = 1000
"""Draws of an interval, as sacrebleu has by default: 25 of them lie beyond each end."""


def share_interval(matches: list[float]) -> list[float]:
    """Return the interval of a share.

    Where all prompts agree, every draw gives the same share. The far end is then from the rule of three: with none of
    n, the true share is below 3 / n with 95 % confidence.

    Args:
        matches: 0 or 1 for each prompt.

    Source: Hanley and Lippman-Hand 1983, "If Nothing Goes Wrong, Is Everything All Right?".
    """
    margin = min(1.0, 3 / len(matches))
    if not any(matches):
        return [0.0, margin]
    if all(matches):
        return [1.0 - margin, 1.0]
    return mean_interval(matches)


def mean_interval(values: list[float], weights: list[float] | None = None) -> list[float]:
    """Return the percentile interval of a weighted mean over rows.

    Args:
        values: one figure per row.
        weights: weight of each row, such as its number of tokens; None weighs all alike. Rows of weight 0 are left out.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.
    """
    weighed = [(value, weight) for value, weight in zip(values, weights or [1.0] * len(values), strict=True) if weight]
    if not weighed:
        return [0.0, 0.0]
    rows, shares = np.array(weighed).T
    random = np.random.default_rng(0)
    means = []
    for _ in range(N_DRAWS):  # one at a time: all at once would take 1,000 indexes per row
        drawn = random.integers(0, len(rows), len(rows))
        means.append((rows[drawn] * shares[drawn]).sum() / shares[drawn].sum())
    low, high = np.percentile(means, (2.5, 97.5))
    return [float(low), float(high)]


def score_intervals(
    texts: list[str], references: list[list[str]], rows: list[dict[str, float]]
) -> dict[str, list[float]]:
    """Return the interval of each score, [low, high].

    Args:
        texts: one answer per prompt.
        references: acceptable answers of each prompt.
        rows: scores of each answer by itself. A score may be missing where it does not apply.
    """
    columns = reference_columns(references)
    intervals = {
        "bleu": _sacrebleu_interval(BLEU(), texts, columns),
        "chrf": _sacrebleu_interval(_Chrf(), texts, columns),
    }
    for name in sorted({name for row in rows for name in row} - {"chrf"}):
        values = [row[name] for row in rows if name in row]
        intervals[name] = mean_interval(values) if name == "rouge_l" else share_interval(values)
    return intervals


class _Chrf(CHRF):
    """chrF whose scores are all floats: sacrebleu 2.6 mixes them with NumPy's, of which it cannot take the mean."""

    def _compute_score_from_stats(self, stats: list[int]) -> CHRFScore:
        score = super()._compute_score_from_stats(stats)
        score.score = float(score.score)
        return score


def _sacrebleu_interval(metric: BLEU | CHRF, texts: list[str], columns: list[list[str | None]]) -> list[float]:
    """Return sacrebleu's own interval of a corpus score, within [0, 100]; its seed is fixed."""
    score = metric.corpus_score(texts, columns, n_bootstrap=N_DRAWS)
    facts = json.loads(score.format(signature=str(metric.get_signature()), is_json=True, width=6))
    if "confidence_mean" not in facts:  # sacrebleu leaves it out if every draw scores 0
        return [0.0, 0.0]
    middle, half = facts["confidence_mean"], facts["confidence_var"]
    return [max(0.0, middle - half), min(100.0, middle + half)]
