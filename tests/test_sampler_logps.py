"""The arithmetic of the probe, by hand; on a real stage it is tested in stages/test_reference.py."""

import math

import numpy as np
import pytest

from dpo_ray.errors import StageError
from dpo_ray.sampler_logps import MIN_PROBE_PAIRS, Probe, check_sampled, choose_probe, measure, objection

from .stages import rows


def probe(errors, tokens, length_gaps=None, beta=0.1):
    """errors: nats of (chosen, rejected) that the engine is off; tokens: their lengths."""
    tokens = np.array(tokens)
    exact = -5.0 * tokens
    gaps = np.abs(tokens[:, 0] - tokens[:, 1]) if length_gaps is None else np.array(length_gaps)
    return measure(exact + np.array(errors), exact, tokens, gaps, beta)


def test_measure_by_hand():
    got = probe([[0.1, -0.2], [0.0, 0.3]], [[10, 20], [5, 5]], length_gaps=[0, 10, 10, 30], beta=0.5)
    assert got.pairs == 2
    assert got.bias == pytest.approx(0.2 / 40)
    assert got.length_reward == pytest.approx(0.5 * 0.005 * 30)
    assert got.error_p99 == pytest.approx(0.5 * 0.3)


def test_measure_takes_percentiles_over_all_pairs_and_over_the_probe():
    """Of 1,000 pairs the 10 longest gaps do not count, of 200 probed pairs the 2 worst."""
    errors = np.zeros((200, 2))
    errors[:2, 0], errors[2, 0] = 50.0, 2.0
    gaps = [10_000] * 10 + [40] * 990
    got = probe(errors, np.full((200, 2), 100), gaps, beta=1.0)
    assert got.error_p99 == pytest.approx(2.0)
    assert got.length_reward == pytest.approx(102 / 40_000 * 40)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("bias", "tokens", "beta", "refused"),
    [
        (0.001, [[300, 300]] * 32, 0.1, False),  # equal lengths: the errors cancel
        (0.001, [[500, 310], [310, 500]] * 16, 0.1, False),  # 0.019
        (0.001, [[500, 290], [290, 500]] * 16, 0.1, True),  # 0.021
        (0.001, [[500, 290], [290, 500]] * 16, 0.05, False),
        (0.0, [[500, 1]] * 32, 1.0, False),
    ],
)
def test_bias_is_refused_where_it_would_reward_length(bias, tokens, beta, refused, sign):
    got = probe(sign * bias * np.array(tokens), tokens, beta=beta)
    assert got.bias == pytest.approx(sign * bias)
    assert bool(objection(got)) == refused


def test_bias_of_the_probe_counts_at_the_length_gaps_of_all_pairs():
    got = probe(0.001 * np.full((32, 2), 300), [[300, 300]] * 32, length_gaps=[0] * 90 + [210] * 10)
    assert "pays length with 0.021 nats" in (objection(got) or "")


@pytest.mark.parametrize(("error", "refused"), [(0.49, False), (0.51, True), (-0.51, True), (math.nan, True)])
def test_error_of_one_pair_in_a_small_probe_is_refused_by_its_size(error, refused):
    errors = np.zeros((32, 2))
    errors[7, 1] = error
    assert bool(objection(probe(errors, np.full((32, 2), 1000)))) == refused


def test_errors_of_rounding_are_taken():
    """0.005 nats a token, as bfloat16 engines show, on completions of some 500 tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(300, 700, (100, 2))
    assert objection(probe(rng.normal(0, 0.005, (100, 2)) * np.sqrt(tokens), tokens)) is None


def test_objection_states_the_figures_and_the_way_out():
    text = objection(Probe(pairs=40, bias=-0.0031, length_reward=0.123, error_p99=0.456)) or ""
    assert all(part in text for part in ("40 pairs", "-0.0031", "0.12", "0.46", "--reference.reuse none"))


@pytest.mark.parametrize(("pairs", "number"), [(1, 1), (31, 31), (32, 32), (1000, 32), (1601, 33), (10_000, 200)])
def test_choose_probe_takes_2_percent_and_at_least_32(pairs, number):
    ids = [f"pair-{i}" for i in range(pairs)]
    got = choose_probe(ids)
    assert len(got) == len(set(got)) == number
    assert set(got) <= set(ids)
    assert choose_probe(ids[::-1]) == got


def test_choose_probe_does_not_take_the_first():
    assert set(choose_probe([f"pair-{i:04d}" for i in range(1000)])) != {f"pair-{i:04d}" for i in range(MIN_PROBE_PAIRS)}


GOOD = {"sampler_id": "me", "chosen_sampler_logps": -1.0, "rejected_sampler_logps": 0.0}


def table(**fields):
    return rows.preferences([rows.pair_row("a", [1], [2], [3], **GOOD), rows.pair_row("b", [1], [2], [3], **GOOD | fields)])


def test_check_sampled_takes_pairs_of_the_reference():
    check_sampled(table(), "me")
    check_sampled(table().slice(0, 0), "me")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler_id": "another"}, "pair b was sampled by another, expected the reference, me,"),
        ({"sampler_id": None}, "pair b was sampled by None"),
        ({"chosen_sampler_logps": None}, "pair b has chosen_sampler_logps None, expected a finite log-probability"),
        ({"chosen_sampler_logps": 0.1}, "pair b has chosen_sampler_logps 0.1"),
        ({"rejected_sampler_logps": math.nan}, "pair b has rejected_sampler_logps nan"),
        ({"rejected_sampler_logps": -math.inf}, "pair b has rejected_sampler_logps -inf"),
    ],
)
def test_check_sampled_names_the_first_pair_that_cannot_be_reused(fields, message):
    with pytest.raises(StageError, match=f"{message}.*--reference.reuse none"):
        check_sampled(table(**fields), "me")
