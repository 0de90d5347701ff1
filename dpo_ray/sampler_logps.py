"""Whether an engine's own log-probabilities of its samples can stand in for those of the reference that it sampled from.

In: what the engine says of every pair, and what the reference's forward says of a few. Out: how far off the engine is, and
why that is too far, or None. Both hold the same weights and differ by rounding; yet an error of one sign in every token
grows with length, and DPO would learn it as a reward for length.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_ray.errors import StageError

SIDES = ("chosen", "rejected")
COLUMNS = ("chosen_sampler_logps", "rejected_sampler_logps")
PROBE_SHARE = 0.02
"""Enough pairs to see the bias: over 10,000 tokens, an error of 0.005 nats each (bfloat16) leaves 5e-5 of doubt on it."""
MIN_PROBE_PAIRS = 32
MAX_LENGTH_REWARD = 0.02
"""Nats that length alone may earn: 1 % of a margin of 2, where a pair counts as learnt (sigmoid(2) = 0.88)."""
MAX_ERROR = 0.05
"""Nats that the margin of a pair may be off: it moves the gradient's weight, sigmoid(-margin), by at most 0.0125."""
WAY_OUT = "`--reference.reuse none` computes the values, from the same pairs"


class Probe(NamedTuple):
    """How far the engine is from the reference, over the pairs of a probe."""

    pairs: int
    bias: float
    """Engine minus reference, nats a token."""
    length_reward: float
    """beta * |bias| * length gap, the 99th percentile of all pairs; nats."""
    error_p99: float
    """beta * |error of chosen - error of rejected|, 99th percentile of the probe; nats."""


def choose_probe(pair_ids: Sequence[str]) -> list[str]:
    """Ids of 2 % of the pairs, at least 32 where there are as many; by hash, so that order and parts do not matter."""
    number = max(MIN_PROBE_PAIRS, math.ceil(PROBE_SHARE * len(pair_ids)))
    return heapq.nsmallest(number, pair_ids, key=lambda pair: hashlib.sha256(pair.encode()).digest())


def measure(sampler: np.ndarray, exact: np.ndarray, tokens: np.ndarray, length_gaps: np.ndarray, beta: float) -> Probe:
    """Compare the two on the pairs of a probe.

    Args:
        sampler, exact: (pairs, 2) log-probabilities of chosen and rejected in nats, of the engine and of the reference.
        tokens: (pairs, 2) lengths of the completions.
        length_gaps: |chosen - rejected| in tokens, of all pairs of the stage.
        beta: train.beta.
    """
    errors = sampler - exact
    bias = float(errors.sum() / tokens.sum())
    # The smallest value that 99 % do not exceed, without interpolation: of fewer than 100 pairs, the worst.
    gap = float(np.quantile(length_gaps, 0.99, method="inverted_cdf"))
    error = float(np.quantile(np.abs(errors[:, 0] - errors[:, 1]), 0.99, method="inverted_cdf"))
    return Probe(len(errors), bias, beta * abs(bias) * gap, beta * error)


def objection(probe: Probe) -> str | None:
    """Why the engine's values cannot stand in, or None."""
    if probe.length_reward <= MAX_LENGTH_REWARD and probe.error_p99 <= MAX_ERROR:
        return None
    return (
        f"the engine's log-probabilities are too far from the reference's, by a probe of {probe.pairs} pairs: biased by "
        f"{probe.bias:.2g} nats a token, which pays length with {probe.length_reward:.2g} nats of reward (allowed: "
        f"{MAX_LENGTH_REWARD:g}); margins off by {probe.error_p99:.2g} nats (99th percentile, allowed: {MAX_ERROR:g}). "
        f"{WAY_OUT}"
    )


def check_sampled(table: pa.Table, reference: str) -> None:
    """Hold rows of PREFERENCES to what reuse needs.

    Raises:
        StageError: another policy than `reference` (an identity) sampled a pair, or a value is no log-probability.
    """
    others = pc.fill_null(pc.not_equal(table["sampler_id"], reference), True)
    if pc.any(others).as_py():
        first = pc.index(others, True).as_py()
        raise StageError(
            f"reference: pair {table['pair_id'][first]} was sampled by {table['sampler_id'][first]}, expected the reference, "
            f"{reference}, whose own values reuse `sampler` takes over. {WAY_OUT}"
        )
    for column in COLUMNS:
        values = table[column]
        bad = pc.invert(pc.fill_null(pc.and_(pc.is_finite(values), pc.less_equal(values, 0.0)), False))
        if pc.any(bad).as_py():
            first = pc.index(bad, True).as_py()
            raise StageError(
                f"reference: pair {table['pair_id'][first]} has {column} {values[first]}, expected a finite log-probability "
                f"<= 0. {WAY_OUT}"
            )
