"""Generates answers greedily, in left-padded batches with a KV cache, and scores them."""

import re

import numpy as np
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from raylora.evaluate.generate import Answers

N_DRAWS = 10_000
"""Of the randomization test: its standard error is .005 at most."""


def score(texts: list[str], references: list[list[str]], answer_pattern: str | None = None) -> dict[str, float]:
    """Quality of answers against all acceptable ones.

    Returns:
        `exact_match` (share, after trimming white space), `bleu` and `chrf` (0 to 100, sacrebleu's defaults over the
        corpus), `rouge_l` (mean F1 against the best reference, 0 to 1), and with `answer_pattern` also `answer_match`.
    """
    matches = [
        text.strip() in {reference.strip() for reference in mine} for text, mine in zip(texts, references, strict=True)
    ]
    columns = _columns(references)
    rouge = RougeScorer(["rougeL"], use_stemmer=False)
    scores = {
        "exact_match": sum(matches) / len(matches),
        "bleu": sacrebleu.corpus_bleu(texts, columns).score,
        "chrf": sacrebleu.corpus_chrf(texts, columns).score,
        "rouge_l": sum(
            rouge.score_multi(mine, text)["rougeL"].fmeasure for text, mine in zip(texts, references, strict=True)
        )
        / len(texts),
    }
    if answer_pattern is not None:
        right = [
            _number(text, answer_pattern) is not None
            and _number(text, answer_pattern) == _number(mine[0], answer_pattern)
            for text, mine in zip(texts, references, strict=True)
        ]
        scores["answer_match"] = sum(right) / len(right)
    return scores


def agreement(one: Answers, other: Answers) -> dict[str, float]:
    """How alike two models answer.

    Returns:
        `tokens`: share of positions with the same token, counted over the longer answer; `answers`: share of answers
        that are the same to the last token.
    """
    pairs = list(zip(one.token_ids, other.token_ids, strict=True))
    same = sum(sum(a == b for a, b in zip(mine, theirs, strict=False)) for mine, theirs in pairs)
    total = sum(max(len(mine), len(theirs)) for mine, theirs in pairs)
    return {
        "tokens": same / total if total else 1.0,
        "answers": sum(mine == theirs for mine, theirs in pairs) / len(pairs),
    }


def bleu_p_value(one: Answers, other: Answers, references: list[list[str]]) -> float:
    """How often chance alone would part the BLEU of two models' answers as far, were the models equally good.

    Paired approximate randomization: each draw swaps the two answers to every prompt or leaves them. sacrebleu's own
    (2.6, `PairedTest`) does not count draws that part them just as far, so that models that differ in one answer, or in
    none, come out as significantly different.

    Source: Riezler and Maxwell 2005, "On Some Pitfalls in Automatic Evaluation and Significance Testing for MT",
    section 4.
    """
    counts, others = (
        np.array([_counts(*pair) for pair in zip(x.texts, references, strict=True)]) for x in (one, other)
    )
    swapped = np.random.default_rng(0).random((N_DRAWS, len(counts))) < 0.5
    first = counts.sum(0) + swapped @ (others - counts)
    second = counts.sum(0) + others.sum(0) - first
    observed = abs(_bleu(counts.sum(0)) - _bleu(others.sum(0)))
    as_far = sum(abs(_bleu(a) - _bleu(b)) > observed - 1e-9 for a, b in zip(first, second, strict=True))
    return (1 + as_far) / (1 + N_DRAWS)


def _counts(text: str, references: list[str]) -> list[int]:
    """What BLEU adds up over texts: lengths, matching n-grams, n-grams."""
    score = BLEU(effective_order=True).sentence_score(text, references)
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def _bleu(counts: np.ndarray) -> float:
    matching, total = counts[2:].reshape(2, -1).tolist()
    return float(BLEU.compute_bleu(matching, total, int(counts[0]), int(counts[1])).score)


def _columns(references: list[list[str]]) -> list[list[str | None]]:
    """References as sacrebleu wants them: as many for each text, where it skips None."""
    return [[mine[i] if i < len(mine) else None for mine in references] for i in range(max(map(len, references)))]


def _number(text: str, pattern: str) -> float | None:
    """The number in the last match of the pattern, with thousands separators left out."""
    found = re.findall(pattern, text)
    try:
        return float(found[-1].strip().replace(",", "").replace("$", "").rstrip(".")) if found else None
    except ValueError:
        return None
