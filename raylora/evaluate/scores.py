"""Scores the answers of models against references, and compares the answers of two models."""

import re

import numpy as np
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from raylora.evaluate.generate import Answers

N_DRAWS = 10_000
"""Draws of the randomization test. The standard error of a p-value is at most .005 = .5 / sqrt(10,000)."""


def score(texts: list[str], references: list[list[str]], answer_pattern: str | None = None) -> dict[str, float]:
    """Score answers against their references.

    Args:
        texts: one answer per prompt, at least one.
        references: acceptable answers of each prompt, at least one each.
        answer_pattern: regular expression whose first group is the answer as a number; None compares no numbers.

    Returns:
        exact_match: share of answers that equal a reference, white space at the ends aside.
        bleu, chrf: score of the whole corpus in [0, 100], with the defaults of sacrebleu.
        rouge_l: mean F1 against the best reference, in [0, 1].
        answer_match: share of answers with the number of the first reference; only with `answer_pattern`.
    """
    columns = reference_columns(references)
    rows = score_rows(texts, references, answer_pattern)
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name != "chrf"}
    return {
        "exact_match": means.pop("exact_match"),
        "bleu": sacrebleu.corpus_bleu(texts, columns).score,
        "chrf": sacrebleu.corpus_chrf(texts, columns).score,
        **means,
    }


def score_rows(
    texts: list[str], references: list[list[str]], answer_pattern: str | None = None
) -> list[dict[str, float]]:
    """Score each answer by itself. Arguments are those of `score`.

    Returns:
        For each answer: exact_match and answer_match, 0 or 1; chrf of the one answer; rouge_l.
    """
    rouge = RougeScorer(["rougeL"], use_stemmer=False)
    rows = []
    for text, accepted in zip(texts, references, strict=True):
        row = {
            "exact_match": float(text.strip() in {reference.strip() for reference in accepted}),
            "chrf": sacrebleu.sentence_chrf(text, accepted).score,
            "rouge_l": float(rouge.score_multi(accepted, text)["rougeL"].fmeasure),
        }
        if answer_pattern is not None:
            number = _number(text, answer_pattern)
            row["answer_match"] = float(number is not None and number == _number(accepted[0], answer_pattern))
        rows.append(row)
    return rows


def score_calls(answered: list[str], expected: list[str]) -> list[dict[str, float]]:
    """Score the tool calls of each answer against the expected ones: names and arguments, in the same order.

    Args:
        answered: tool calls of each answer as JSON text with sorted keys; empty if there are none.
        expected: those that the data has, likewise.

    Returns:
        For each answer: tool_call_match, 0 or 1, where calls are expected; nothing where none are.
    """
    return [{"tool_call_match": float(a == b)} if b else {} for a, b in zip(answered, expected, strict=True)]


def agreement(one: Answers, other: Answers) -> dict[str, float]:
    """Compare the answers of two models to the same prompts, token by token.

    Returns:
        tokens: share of positions with the same token, out of the positions of the longer answer.
        answers: share of answers that are equal in all tokens.
    """
    pairs = list(zip(one.token_ids, other.token_ids, strict=True))
    same = sum(sum(a == b for a, b in zip(ids, other_ids, strict=False)) for ids, other_ids in pairs)
    total = sum(max(len(ids), len(other_ids)) for ids, other_ids in pairs)
    return {
        "tokens": same / total if total else 1.0,
        "answers": sum(ids == other_ids for ids, other_ids in pairs) / len(pairs),
    }


def bleu_p_value(one: Answers, other: Answers, references: list[list[str]]) -> float:
    """Return the p-value of the BLEU difference of two models under paired approximate randomization.

    Each draw swaps the two answers to a prompt, or leaves them, with equal probability. The p-value is the share of
    draws with a difference at least as large as the observed one.

    We do not use `PairedTest` of sacrebleu 2.6. It does not count draws with an equal difference, so that it finds two
    models significantly different that differ in one answer or in none.

    Args:
        one: answers of a model.
        other: answers of another model to the same prompts.
        references: acceptable answers of each prompt.

    Returns:
        p-value in (0, 1].

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
    # 1e-9 allows for rounding, so that equal differences count
    as_large = sum(abs(_bleu(a) - _bleu(b)) > observed - 1e-9 for a, b in zip(first, second, strict=True))
    return (1 + as_large) / (1 + N_DRAWS)


def _counts(text: str, references: list[str]) -> list[int]:
    """Return the counts that BLEU sums over texts: both lengths, matching n-grams, n-grams."""
    score = BLEU(effective_order=True).sentence_score(text, references)
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def _bleu(counts: np.ndarray) -> float:
    """Return the BLEU of summed counts."""
    matching, total = counts[2:].reshape(2, -1).tolist()
    return float(BLEU.compute_bleu(matching, total, int(counts[0]), int(counts[1])).score)


def reference_columns(references: list[list[str]]) -> list[list[str | None]]:
    """Return the references in the form of sacrebleu: one list per rank of reference, None if a text has fewer."""
    most = max(map(len, references))
    return [[accepted[i] if i < len(accepted) else None for accepted in references] for i in range(most)]


def _number(text: str, pattern: str) -> float | None:
    """Return the number in the first group of the pattern's last match, or None.

    Thousands separators and dollar signs are ignored.
    """
    found = [match[1] or "" for match in re.finditer(pattern, text)]
    try:
        return float(found[-1].strip().replace(",", "").replace("$", "").rstrip(".")) if found else None
    except ValueError:
        return None
