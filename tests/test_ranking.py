import math

import pytest

from dpo_ray.errors import StageError
from dpo_ray.ranking import best_of, describe, distinct_2, mean_and_error, mean_by_group, scores_by_prompt, win_rate

NAN = math.nan


def completion(score, text="a b", tokens=2, finish_reason="stop"):
    return {"score": score, "text": text, "token_ids": [5] * tokens, "finish_reason": finish_reason}


def row(prompt, *scores):
    return {"prompt_id": prompt, "completions": [completion(s) for s in scores]}


def test_win_rate_with_ties_is_derived_by_hand():
    """Prompt a: win 1; b: tie 1/2; c: loss 0; d: samples win and tie, 3/4. Mean 2.25 / 4; ties 2 of 5 comparisons."""
    policy = {"a": [2.0], "b": [1.0], "c": [0.0], "d": [3.0, 1.0]}
    other = {"a": [1.0], "b": [1.0], "c": [5.0], "d": [2.0, 1.0]}
    got = win_rate(policy, other, 200, seed=0)
    assert got.value == pytest.approx(2.25 / 4)
    assert got.ties == pytest.approx(2 / 5)


def test_win_rate_of_a_policy_over_itself_is_one_half():
    scores = {str(i): [float(i)] for i in range(7)}
    got = win_rate(scores, scores, 200, seed=0)
    assert (got.value, got.low, got.high, got.ties) == (0.5, 0.5, 0.5, 1.0)


def test_win_rate_swapped_is_the_complement():
    a, b = {"x": [1.0], "y": [2.0], "z": [3.0]}, {"x": [2.0], "y": [1.0], "z": [3.0]}
    assert win_rate(a, b, 100, 0).value == pytest.approx(1 - win_rate(b, a, 100, 0).value)


def test_win_rate_nan_and_prompts_of_one_side_alone_are_left_out():
    policy = {"a": [1.0], "b": [NAN], "c": [1.0, 0.0], "only": [9.0]}
    other = {"a": [0.0], "b": [0.0], "c": [NAN, 1.0]}
    assert win_rate(policy, other, 200, seed=0).value == pytest.approx((1 + 0) / 2)


def test_win_rate_more_samples_of_the_other_side_are_not_compared():
    assert win_rate({"a": [1.0]}, {"a": [0.0, 9.0, 9.0]}, 100, 0).value == 1.0


@pytest.mark.parametrize(("policy", "other"), [({}, {}), ({"a": [NAN]}, {"a": [1.0]}), ({"a": [1.0]}, {"b": [1.0]})])
def test_win_rate_with_nothing_to_compare_is_a_stage_error(policy, other):
    with pytest.raises(StageError):
        win_rate(policy, other, 100, 0)


def test_win_rate_interval_contains_the_value_and_shrinks_with_more_prompts():
    """60 % wins. The interval's half width is about 1.96 * sqrt(0.24 / n): 0.21 at 20 prompts, 0.034 at 800."""
    widths = []
    for n in (20, 200, 800):
        policy = {str(i): [1.0 if i % 5 < 3 else 0.0] for i in range(n)}
        got = win_rate(policy, {str(i): [0.5] for i in range(n)}, 2000, seed=0)
        assert got.value == pytest.approx(0.6)
        assert got.low < got.value < got.high
        assert (got.high - got.low) / 2 == pytest.approx(1.96 * math.sqrt(0.24 / n), rel=0.15)
        widths.append(got.high - got.low)
    assert widths == sorted(widths, reverse=True)


def test_win_rate_interval_is_the_same_for_the_same_seed():
    policy, other = {str(i): [float(i % 3)] for i in range(30)}, {str(i): [1.0] for i in range(30)}
    assert win_rate(policy, other, 500, 3) == win_rate(policy, other, 500, 3)


def test_scores_by_prompt_takes_the_first_samples_in_order():
    got = scores_by_prompt([row("a", 1.0, None, 3.0)], 2)
    assert got["a"][0] == 1.0
    assert math.isnan(got["a"][1])
    assert len(got["a"]) == 2


def test_describe_counts_the_first_completions_alone():
    rows = [
        {"completions": [completion(1.0, "a b c", 3), completion(99.0, "far off", 50)]},
        {"completions": [completion(None, "a b", 5, "length")]},
        {"completions": [completion(3.0, "a b c", 4)]},
        {"completions": [completion(math.inf, "d", 8)]},
    ]
    got = describe(rows, 1)
    assert got["mean_score"] == 2.0
    assert got["mean_score_se"] == pytest.approx(1.0)  # values 1 and 3: deviation sqrt(2), over sqrt(2)
    assert got["mean_tokens"] == 5.0
    assert got["cut_by_length"] == 0.25
    assert got["distinct"] == 3 / 4


@pytest.mark.parametrize(
    ("texts", "value"),
    [
        (["a b c"], 1.0),  # ab, bc
        (["a a a a"], 1 / 3),  # aa three times
        (["a b", "a b"], 1 / 2),
        (["a b a b"], 2 / 3),  # ab, ba, ab
        (["one"], 0.0),
        ([], 0.0),
    ],
)
def test_distinct_2_is_distinct_bigrams_over_all_bigrams(texts, value):
    assert distinct_2(texts) == pytest.approx(value)


def test_best_of_is_the_mean_of_the_best_among_the_first_n():
    rows = [row("a", 1.0, 5.0, 9.0), row("b", None, -2.0, 0.0), row("c", NAN, None, 7.0)]
    assert best_of(rows, 2) == pytest.approx((5.0 - 2.0) / 2)
    assert best_of(rows, 3) == pytest.approx((9.0 + 0.0 + 7.0) / 3)


def test_mean_and_error_by_hand_and_of_too_few():
    mean, error = mean_and_error([1.0, 2.0, 3.0, 4.0])
    assert (mean, error) == (2.5, pytest.approx(math.sqrt(5 / 3) / 2))
    assert mean_and_error([2.0])[0] == 2.0
    assert mean_and_error([2.0])[1] is None
    assert mean_and_error([]) == (None, None)


def test_mean_by_group_is_over_values_and_its_interval_over_groups():
    """Groups of one, of three and of two: 4 of 6. With one group every resample is the same."""
    found = mean_by_group({"a": [1.0], "b": [1.0, 1.0, 0.0], "c": [0.0, 1.0]}, 500, seed=0)
    assert found.value == pytest.approx(4 / 6)
    assert found.low < found.value < found.high
    assert mean_by_group({"a": [1.0, 0.0]}, 100, seed=0) == (0.5, 0.5, 0.5)
