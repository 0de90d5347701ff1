import math

import pytest

from dpo_ray.config import Pair, RunConfig
from dpo_ray.schemas import content_id
from dpo_ray.stages import pair
from dpo_ray.stages.pair import pair_prompt

from ..artifacts import commit_tables, context, kept, quarantined
from ..test_config import minimal
from . import rows

NAN = math.nan


def row(*completions):
    return rows.scored_row("prompt", list(completions)) | {"_part": "part-00000"}


def c(key, score, **fields):
    return rows.completion(key, score, **fields)


def pairs(got):
    """(chosen, rejected) texts without their beginning, or the drop reason."""
    return [p["drop_reason"] or (p["chosen"].removeprefix("text of "), p["rejected"].removeprefix("text of ")) for p in got]


FOUR = [c("a", 1.0), c("b", 4.0), c("c", 2.0), c("d", 3.0)]
SAME = {"token_ids": [7, 8]}


@pytest.mark.parametrize(
    ("completions", "block", "wanted"),
    [
        # Methods
        (FOUR, {}, [("b", "a")]),
        (FOUR, {"min_gap": 3.0}, [("b", "a")]),
        (FOUR, {"min_gap": 3.5}, ["below_min_gap"]),
        (FOUR, {"method": "all_above_gap", "min_gap": 2.0}, [("b", "c"), ("b", "a"), ("d", "a")]),
        (FOUR[:3], {"method": "all_above_gap"}, [("b", "c"), ("b", "a"), ("c", "a")]),
        (FOUR, {"method": "all_above_gap", "min_gap": 9.0}, ["below_min_gap"]),
        # Ties
        ([c("a", 1.0), c("b", 1.0)], {}, ["tie"]),
        ([c("a", 1.0), c("b", 1.0)], {"drop_ties": False}, [("a", "b")]),
        ([c("a", 1.0), c("b", 1.0), c("c", 0.0)], {"method": "all_above_gap"}, [("a", "c"), ("b", "c")]),
        ([c("a", 2.0), c("b", 2.0), c("c", 0.0)], {}, [("a", "c")]),  # the earlier sample wins a tie
        # Identical
        ([c("a", 1.0, **SAME), c("b", 2.0, **SAME)], {}, ["identical"]),
        ([c("a", 1.0, **SAME), c("b", 2.0, **SAME)], {"drop_identical": False}, [("b", "a")]),
        ([c("a", 1.0, **SAME), c("b", 1.0, **SAME)], {}, ["identical"]),
        ([c("a", 1.0, text="same"), c("b", 2.0, text="same")], {}, [("same", "same")]),  # other tokens, other completions
        # Empty
        ([c("a", 1.0), c("b", 2.0, text=" \n")], {}, ["empty"]),
        ([c("a", 1.0), c("b", 2.0, text=" \n")], {"drop_empty": False}, [(" \n", "a")]),
        ([c("a", 1.0), c("b", 2.0, text="", token_ids=[])], {"drop_empty": False}, ["empty"]),  # nothing to train on
        ([c("a", 1.0), c("b", 2.0, text=""), c("d", 3.0)], {}, [("d", "a")]),
        # Scores that are none
        ([c("a", 1.0), c("b", NAN)], {}, ["non_finite_score"]),
        ([c("a", 1.0), c("b", None)], {}, ["non_finite_score"]),
        ([c("a", 1.0), c("b", math.inf), c("d", -1.0)], {}, [("a", "d")]),
        # Cut by length
        ([c("a", 1.0), c("b", 2.0, finish_reason="length")], {}, ["cut_by_length"]),
        ([c("a", 1.0), c("b", 2.0, finish_reason="length")], {"drop_length_cut": False}, [("b", "a")]),
        # Dropped by the scorer; the commonest reason stands for the prompt
        ([c("a", 1.0), c("b", None, drop_reason="scorer_error: ValueError: x")], {}, ["scorer_error"]),
        ([c("a", NAN), c("b", 2.0, text=""), c("d", 3.0, text="")], {}, ["empty"]),
        ([c("a", 1.0)], {}, ["too_few_completions"]),
        ([], {}, ["too_few_completions"]),
    ],
)
def test_pair_prompt_by_hand(completions, block, wanted):
    assert pairs(pair_prompt(row(*completions), Pair(**block), seed=0)) == wanted


def test_pair_prompt_random_is_one_pair_in_order_of_score_and_the_same_every_time():
    block = Pair(method="random")
    scores = {x["text"]: x["score"] for x in FOUR}
    found = set()
    for i in range(60):
        made = {**row(*FOUR), "prompt_id": f"prompt {i}"}
        (got,) = pair_prompt(made, block, seed=0)
        assert pair_prompt(made, block, seed=0) == [got]
        assert scores[got["chosen"]] > scores[got["rejected"]]
        found.add((got["chosen"], got["rejected"]))
    assert len(found) == 6  # every one of the pairs of four


def test_pair_prompt_random_differs_by_seed():
    block = Pair(method="random")
    of_seed = [pairs([p for i in range(8) for p in pair_prompt({**row(*FOUR), "prompt_id": str(i)}, block, s)]) for s in (0, 1)]
    assert of_seed[0] != of_seed[1]


def test_pair_prompt_row_carries_tokens_scores_and_an_id_of_its_two_completions():
    (got,) = pair_prompt(row(c("a", 1.0), c("b", 2.0)), Pair(), seed=0)
    assert got["pair_id"] == content_id("b", "a")
    assert (got["chosen_token_ids"], got["rejected_token_ids"]) == (c("b", 0)["token_ids"], c("a", 0)["token_ids"])
    assert (got["chosen_score"], got["rejected_score"]) == (2.0, 1.0)
    assert (got["prompt_token_ids"], got["round"]) == ([1, 2], 0)


def test_pair_prompt_row_carries_what_the_engine_said_of_each_side():
    completions = [c("a", 1.0, sampler_logps_sum=-1.5), c("b", 2.0, sampler_logps_sum=-2.5)]
    (got,) = pair_prompt(row(*completions), Pair(), seed=0)
    assert (got["chosen_sampler_logps"], got["rejected_sampler_logps"], got["sampler_id"]) == (-2.5, -1.5, "policy")
    completions[0]["policy"] = "another"
    assert [p["sampler_id"] for p in pair_prompt(row(*completions), Pair(), seed=0)] == [None]


@pytest.mark.usefixtures("local_ray")
def test_pair_stage_prompts_in_are_those_paired_and_those_dropped(tmp_path):
    table = rows.scored(
        [
            rows.scored_row(f"good {i}", [c(f"{i}{k}", float(s), sampler_logps_sum=-s) for s, k in enumerate("abc", 1)])
            for i in range(3)
        ]
        + [rows.scored_row("tie", [c("x", 1.0), c("y", 1.0)]), rows.scored_row("cut", [c("z", 1.0, finish_reason="length")])]
    )
    config = RunConfig.model_validate(minimal() | {"pair": {"method": "all_above_gap", "resources": {"rows_per_part": 2}}})
    stage = pair.stage(config, 0)
    made = context(tmp_path / "out", {"scored": commit_tables(tmp_path / "in", [table])})
    output = stage.run(made)
    got = kept(tmp_path / "out", output)
    assert (output.rows_in, output.rows_out, output.dropped) == (5, 9, {"tie": 1, "cut_by_length": 1})
    assert len({p["prompt_id"] for p in got}) == 3
    assert len({p["pair_id"] for p in got}) == 9
    assert all(p["chosen_score"] > p["rejected_score"] for p in got)
    assert all(
        (p["chosen_sampler_logps"], p["rejected_sampler_logps"]) == (-p["chosen_score"], -p["rejected_score"]) for p in got
    )
    assert {p["sampler_id"] for p in got} == {"policy"}
    assert {q["prompt"][0]["content"]: q["drop_reason"] for q in quarantined(tmp_path / "out", output)} == {
        "tie": "tie",
        "cut": "cut_by_length",
    }
    assert output.metrics["score_gap_sum"] == pytest.approx(3 * (1 + 2 + 1))
    assert output.metrics["tokens"] == sum(len(p[f"{side}_token_ids"]) for p in got for side in ("chosen", "rejected"))
