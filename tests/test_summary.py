import dataclasses

import pytest

from dpo_ray import summary
from dpo_ray.flow.runner import Action, Outcome
from dpo_ray.flow.stage import Needs, Stage, StageOutput

from .artifacts import commit_tables
from .flow.test_artifact import TABLE

METRICS = {
    "prompts": 100,
    "win_rate": 0.625,
    "win_rate_low": 0.5,
    "win_rate_high": 0.75,
    "tie_rate": 0.125,
    "mean_score": 2.5,
    "mean_score_start": 1.25,
    "kl": 3.5,
    "kl_se": 0.25,
    "engine_mismatch": 1e-6,
    **{f"{name}{of}": 0.5 for name in ("mean_tokens", "cut_by_length", "distinct", "distinct_2") for of in ("", "_start")},
}


def stage(name, round_=0, **fields):
    return Stage(name, round_, 1, {}, {}, lambda context: StageOutput([], 0, 0, {}), **fields)


def lines(text):
    return {" ".join(line.split()[:3]): line for line in text.splitlines()}


def test_plan_table_has_a_line_for_every_stage_with_what_it_needs():
    stages = [(stage("policy", None), Action.SKIP), (stage("train", needs=Needs(2, 1.0, 1.0, "train worker")), Action.RUN)]
    *_, policy, train = summary.plan_table(stages).splitlines()
    assert policy.split() == ["policy", "done", "-"]
    assert train.split() == ["round_00/train", "run", "2", "train", "worker", "x", "1", "CPU", "+", "1", "GPU"]


def outcome(tmp_path, skipped=False, **fields):
    artifact = commit_tables(tmp_path, [TABLE])
    manifest = artifact.manifest.model_copy(update=fields)
    return Outcome(stage("pair"), dataclasses.replace(artifact, manifest=manifest), skipped)


def test_outcome_table_gives_rows_drops_by_reason_seconds_and_rate(tmp_path):
    done = outcome(tmp_path, rows_in=10, rows_out=7, dropped={"tie": 2, "empty": 1}, seconds=2.0, metrics={"tokens": 4000.0})
    *_, line = summary.outcome_table([done]).splitlines()
    assert line.split() == ["round_00/pair", "10", "7", "1", "empty,", "2", "tie", "2.0", "2,000"]


@pytest.mark.parametrize("fields", [{"metrics": {}}, {"metrics": {"tokens": 5.0}, "seconds": 0.0}])
def test_outcome_table_without_tokens_or_time_gives_no_rate(tmp_path, fields):
    *_, line = summary.outcome_table([outcome(tmp_path, **fields)]).splitlines()
    assert line.split()[-1] == "-"


def test_outcome_table_marks_what_was_done_before(tmp_path):
    assert "done before" in summary.outcome_table([outcome(tmp_path, skipped=True)])
    assert "done before" not in summary.outcome_table([outcome(tmp_path)])


def test_round_result_gives_the_win_rate_with_its_interval_and_the_scores():
    text = summary.round_result(METRICS)
    assert all(figure in text for figure in ("0.625", "0.500 to 0.750", "12.5%", "1.250 -> 2.500", "3.50 +- 0.25"))


def test_round_result_without_an_error_of_kl_says_so():
    assert "3.50 +- n/a" in summary.round_result(METRICS | {"kl_se": None})


@pytest.mark.parametrize(
    ("extra", "figure"),
    [
        ({"win_rate_initial": 0.875, "win_rate_initial_low": 0.5, "win_rate_initial_high": 1.0}, "0.875"),
        ({"best_of_16_start": 6.125}, "best of 16 at the start"),
        ({"eval_rewards/accuracies": 0.8125, "eval_pairs": 32, "eval_rewards/margins": 0.1}, "0.812 on 32"),
    ],
)
def test_round_result_adds_a_line_for_what_was_also_measured(extra, figure):
    plain, more = summary.round_result(METRICS), summary.round_result(METRICS | extra)
    assert len(more.splitlines()) == len(plain.splitlines()) + 1
    assert figure in more


def test_round_result_of_held_out_pairs_gives_the_accuracy_with_its_interval():
    metrics = {
        "eval_pairs": 32,
        "eval_conversations": 30,
        "eval_loss": 0.5,
        "eval_rewards/accuracies": 0.8125,
        "eval_rewards/accuracies_low": 0.625,
        "eval_rewards/accuracies_high": 0.9375,
        "eval_rewards/margins": 0.25,
        "eval_rewards/margins_se": None,
        "kl": 1.5,
        "kl_se": 0.125,
        "kl_per_token": 0.01,
        "mean_tokens_chosen": 20.0,
        "mean_tokens_rejected": 30.0,
    }
    text = summary.round_result(metrics)
    assert all(figure in text for figure in ("0.812", "0.625 to 0.938", "32 held-out pairs", "0.250 +- n/a", "1.500 +- 0.125"))
