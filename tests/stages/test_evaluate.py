"""The statistics of evaluate by hand; the stage as a whole runs in tests/runs."""

import math

import pytest

from dpo_ray.config import RunConfig
from dpo_ray.stages import evaluate

from ..test_config import minimal
from . import rows


def config_of(**evaluate_fields):
    return RunConfig.model_validate(minimal() | {"evaluate": evaluate_fields})


def row(prompt, *scores, text=None):
    completions = [rows.completion(f"{prompt}-{k}", s, text=text or f"words {k}") for k, s in enumerate(scores)]
    return rows.scored_row(prompt, completions)


START = [row("a", 1.0, 5.0), row("b", 2.0, 0.0), row("c", 3.0, 3.0)]
POLICY = [row("b", 2.0), row("c", 1.0), row("a", 9.0)]  # another order: matched by prompt


def compare(scored, policy_logps=None, reference_logps=None, pairs=(), **fields):
    return evaluate.compare(config_of(**fields), scored, policy_logps or {}, reference_logps or {}, list(pairs))


def test_compare_win_rate_against_the_start_by_hand():
    """a wins, b ties, c loses: 1/2. The second samples of the start are not compared."""
    metrics = compare({"start": START, "policy": POLICY})
    assert metrics["win_rate"] == pytest.approx(0.5)
    assert metrics["tie_rate"] == pytest.approx(1 / 3)
    assert metrics["win_rate_low"] <= metrics["win_rate"] <= metrics["win_rate_high"]
    assert (metrics["mean_score"], metrics["mean_score_start"]) == (4.0, 2.0)
    assert metrics["prompts"] == 3
    assert "win_rate_initial" not in metrics
    assert not any(k.startswith("best_of") for k in metrics)


def test_compare_from_the_second_round_on_also_with_the_initial_policy():
    metrics = compare({"start": START, "policy": POLICY, "initial": [row("a", 0.0), row("b", 0.0), row("c", 0.0)]})
    assert (metrics["win_rate"], metrics["win_rate_initial"]) == (pytest.approx(0.5), 1.0)
    assert metrics["mean_score_initial"] == 0.0


def test_compare_best_of_n_takes_the_start_alone():
    assert compare({"start": START, "policy": POLICY}, best_of=2)["best_of_2_start"] == pytest.approx((5 + 2 + 3) / 3)


def test_compare_kl_is_the_mean_log_ratio_of_the_policys_own_samples():
    metrics = compare(
        {"start": START, "policy": POLICY},
        {"kl/x": -1.0, "kl/y": -2.0, "chosen/p": -100.0, "rejected/p": -50.0},
        {"kl/x": -3.0, "kl/y": -6.0, "chosen/p": -1.0, "rejected/p": -1.0},
        [{"pair_id": "p"}],
    )
    assert metrics["kl"] == pytest.approx((2 + 4) / 2)
    assert metrics["kl_se"] == pytest.approx(math.sqrt(2) / math.sqrt(2))


def test_compare_implicit_rewards_by_hand():
    """beta 0.1; margins of p: 0.1 * ((-1 + 3) - (-4 + 5)) = 0.1; of q: 0.1 * ((-2 + 1) - (-2 + 2)) = -0.1."""
    policy = {"chosen/p": -1.0, "rejected/p": -4.0, "chosen/q": -2.0, "rejected/q": -2.0, "kl/x": -1.0}
    reference = {"chosen/p": -3.0, "rejected/p": -5.0, "chosen/q": -1.0, "rejected/q": -2.0, "kl/x": -1.0}
    metrics = compare({"start": START, "policy": POLICY}, policy, reference, [{"pair_id": "p"}, {"pair_id": "q"}])
    assert metrics["eval_rewards/accuracies"] == 0.5
    assert metrics["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-12)
    assert metrics["eval_pairs"] == 2
    assert metrics["kl"] == 0.0


def test_compare_without_pairs_gives_no_implicit_rewards():
    assert not any(k.startswith("eval_") for k in compare({"start": START, "policy": POLICY}))


def test_engine_mismatch_is_per_token_and_leaves_out_empty_completions():
    completion = lambda i, logps, ids: {"completion_id": i, "sampler_logps_sum": logps, "token_ids": ids}
    rows = [
        {"completions": [completion("x", -1.0, [5, 6, 7])]},
        {"completions": [completion("y", -2.5, [8]), completion("z", None, [])]},
    ]
    assert evaluate.engine_mismatch(rows, {"kl/x": -1.25, "kl/y": -2.0}) == pytest.approx((0.25 + 0.5) / 4)


def test_samples_for_people_show_both_sides_of_the_same_prompt():
    got = list(evaluate.samples_for_people({"start": START, "policy": POLICY}, limit=2))
    assert [(s["prompt"], s["start"]["score"], s["policy"]["score"]) for s in got] == [("a", 1.0, 9.0), ("b", 2.0, 2.0)]


def test_sampling_of_evaluate_is_that_of_generate_unless_it_has_its_own():
    own = {"temperature": 0.3}
    assert evaluate.sampling(config_of()) == config_of().generate.sampling
    assert evaluate.sampling(config_of(sampling=own)).temperature == 0.3
