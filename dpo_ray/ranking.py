"""Statistics over scored completions: win rates with intervals, best of n, diversity. Pure functions on plain rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from dpo_ray.errors import StageError

Row = Mapping[str, Any]


class WinRate(NamedTuple):
    """Share of prompts won, a tie counting half, with its 95 % bootstrap interval over prompts."""

    value: float
    low: float
    high: float
    ties: float
    """Share of the comparisons that are ties."""


def scores_by_prompt(rows: Iterable[Row], num_completions: int) -> dict[str, list[float]]:
    """prompt_id -> scores of its first samples, in sample order; NaN for one that could not be scored."""
    return {
        row["prompt_id"]: [math.nan if c["score"] is None else c["score"] for c in row["completions"][:num_completions]]
        for row in rows
    }


def win_rate(
    policy: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]], bootstrap_samples: int, seed: int
) -> WinRate:
    """Win rate of `policy` over `other`, sample k against sample k of the same prompt.

    A prompt counts once, with the mean of its comparisons. Comparisons with a NaN are left out.

    Raises:
        StageError: no prompt has a comparison.
    """
    outcomes, ties, compared = [], 0, 0
    for prompt in sorted(policy.keys() & other.keys()):
        points = []
        for a, b in zip(policy[prompt], other[prompt], strict=False):  # `other` may have more samples, for best of n
            if math.isnan(a) or math.isnan(b):
                continue
            points.append(1.0 if a > b else 0.5 if a == b else 0.0)
            ties += a == b
        compared += len(points)
        if points:
            outcomes.append(sum(points) / len(points))
    if not outcomes:
        raise StageError("evaluate: no held-out prompt has a scored completion of both policies; nothing can be compared")
    values = np.array(outcomes)
    draws = np.random.default_rng(seed).integers(0, len(values), size=(bootstrap_samples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return WinRate(float(values.mean()), float(low), float(high), ties / compared)


class Estimate(NamedTuple):
    """A mean with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def mean_by_group(values: Mapping[str, Sequence[float]], bootstrap_samples: int, seed: int) -> Estimate:
    """Mean of all values; the interval resamples whole groups, since values of one group depend on each other."""
    sums = np.array([sum(group) for group in values.values()])
    sizes = np.array([len(group) for group in values.values()])
    draws = np.random.default_rng(seed).integers(0, len(sums), size=(bootstrap_samples, len(sums)))
    low, high = np.quantile(sums[draws].sum(axis=1) / sizes[draws].sum(axis=1), [0.025, 0.975])
    return Estimate(float(sums.sum() / sizes.sum()), float(low), float(high))


def describe(rows: Sequence[Row], num_completions: int) -> dict[str, float | None]:
    """Mean score, length in tokens, share cut by length, share of distinct completions, and distinct-2."""
    completions = [c for row in rows for c in row["completions"][:num_completions]]
    scores = [c["score"] for c in completions if c["score"] is not None and math.isfinite(c["score"])]
    texts = [c["text"] for c in completions]
    mean_score, error = mean_and_error(scores)
    return {
        "mean_score": mean_score,
        "mean_score_se": error,
        "mean_tokens": float(np.mean([len(c["token_ids"]) for c in completions])),
        "cut_by_length": float(np.mean([c["finish_reason"] == "length" for c in completions])),
        "distinct": len(set(texts)) / len(texts),
        "distinct_2": distinct_2(texts),
    }


def best_of(rows: Sequence[Row], n: int) -> float:
    """Mean over prompts of the best score among the first n completions."""
    best = []
    for row in rows:
        scores = [c["score"] for c in row["completions"][:n] if c["score"] is not None and math.isfinite(c["score"])]
        if scores:
            best.append(max(scores))
    return float(np.mean(best))


def distinct_2(texts: Iterable[str]) -> float:
    """Distinct word bigrams over all word bigrams of the texts (Li et al., arXiv:1510.03055)."""
    bigrams = [pair for text in texts for pair in pairwise(text.split())]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error; None for what cannot be had from so few values."""
    if not values:
        return None, None
    mean = float(np.mean(values))
    return mean, float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
