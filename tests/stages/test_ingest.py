import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from dpo_ray.config import PreferenceRun
from dpo_ray.errors import StageError
from dpo_ray.schemas import COMPARISONS, prompt_id
from dpo_ray.stages import ingest, preferences
from dpo_ray.stages.ingest import fit

from ..artifacts import commit_policy, commit_tables, context, kept, quarantined
from ..learn import tiny
from ..test_config import minimal_preferences


def comparison(prompt, chosen, rejected):
    messages = [{"role": "user", "content": prompt}]
    fields = {"pair_id": f"{prompt}|{chosen}|{rejected}", "prompt_id": prompt_id(messages), "opening": prompt}
    return fields | {"prompt": messages, "split": "train", "tools": None, "chosen": chosen, "rejected": rejected}


def test_fit_cuts_each_side_to_what_the_prompt_leaves():
    chosen, rejected = list(range(40)), list(range(100, 150))
    assert fit(20, chosen, rejected, 50, cut=True) == (chosen[:30], rejected[:30], None)
    assert fit(20, chosen, rejected[:30], 50, cut=True) == (chosen[:30], rejected[:30], None)
    assert fit(20, chosen, rejected, 70, cut=False) == (chosen, rejected, None)


@pytest.mark.parametrize(
    ("prompt_tokens", "chosen", "rejected", "cut", "reason"),
    [
        (20, 40, 10, False, "completion_too_long"),
        (20, 10, 40, False, "completion_too_long"),
        (50, 10, 10, True, "prompt_too_long"),
        (50, 10, 10, False, "prompt_too_long"),
        (60, 1, 1, True, "prompt_too_long"),
    ],
)
def test_fit_of_what_does_not_fit_is_no_pair(prompt_tokens, chosen, rejected, cut, reason):
    assert fit(prompt_tokens, [1] * chosen, [2] * rejected, 50, cut=cut) == ([], [], reason)


def test_fit_of_sides_that_are_equal_once_cut_is_no_pair():
    assert fit(20, [1] * 30 + [2], [1] * 30 + [3], 50, cut=True) == ([], [], "identical")


# On real Ray Data


GOOD = [comparison(f"w{6 + i} w7", "w8 w9", f"w10 w{11 + i}") for i in range(9)]
BAD = [
    (comparison("w7 " * 40, "w8", "w9"), "prompt_too_long"),
    (comparison("w20", "w8 " * 60, "w9"), "completion_too_long"),
    (comparison("w21", "w8 <eos> w9", "w9"), "turn_token_in_text"),
    (comparison("w22", "w8  w9", "w8 w9"), "identical"),  # texts differ, their tokens do not
    (comparison("w23 <bos>", "w8", "w9"), "template_error"),
]


def run(tmp_path, policy, rows, **fields):
    tree = minimal_preferences()
    block = {"max_prompt_tokens": 30, "max_tokens": 50, "max_dropped": 0.5, "resources": {"rows_per_part": 4}} | fields
    config = PreferenceRun.model_validate(tree | {"preferences": tree["preferences"] | block})
    inputs = {
        "preferences": commit_tables(tmp_path / "preferences", [pa.Table.from_pylist(rows, COMPARISONS)], "train-"),
        "policy": commit_policy(tmp_path / "policy", policy.path, policy.identity),
    }
    output = ingest.stage(config, 0, "policy", preferences.slice_of_round).run(context(tmp_path / "out", inputs))
    return output, tmp_path / "out"


@pytest.fixture(scope="module")
def ingested(local_ray, tmp_path_factory, policy):
    return run(tmp_path_factory.mktemp("ingest"), policy, [*GOOD, *(row for row, _ in BAD)])


def test_ingest_every_pair_is_out_or_in_quarantine_with_its_reason(ingested):
    output, directory = ingested
    assert output.rows_in == 14 == output.rows_out + sum(output.dropped.values())
    assert output.dropped == {reason: 1 for _, reason in BAD}
    reasons = {row["pair_id"]: row["drop_reason"].split(":")[0] for row in quarantined(directory, output)}
    assert reasons == {row["pair_id"]: reason for row, reason in BAD}


def test_ingest_token_ids_are_the_template_up_to_the_answer_and_the_answer_with_one_end(ingested, policy):
    output, directory = ingested
    tokenizer = AutoTokenizer.from_pretrained(policy.path)
    wanted = {row["pair_id"]: row for row in GOOD}
    for row in kept(directory, output):
        given = wanted.pop(row["pair_id"])
        prompt = tokenizer.apply_chat_template(given["prompt"], add_generation_prompt=True, return_dict=False)
        assert row["prompt_token_ids"] == prompt
        assert row["prompt_token_ids"].count(tiny.BOS) == 1
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_token_ids"]
            assert ids[-1] == tiny.EOS
            assert ids.count(tiny.EOS) == 1
            assert tokenizer.decode(ids[:-1]) == given[side] == row[side]
            assert row[f"{side}_score"] is None
            assert row[f"{side}_sampler_logps"] is None
        assert row["sampler_id"] is None
    assert wanted == {}


def test_ingest_cut_answers_have_no_end(local_ray, tmp_path, policy):
    rows = [comparison(f"w{20 + i}", "w8 " * 60 + f"w{9 + i}", "w9") for i in range(3)]
    output, directory = run(tmp_path, policy, rows, too_long="cut")
    for row in kept(directory, output):
        assert len(row["prompt_token_ids"]) + len(row["chosen_token_ids"]) == 50
        assert tiny.EOS not in row["chosen_token_ids"]
        assert row["rejected_token_ids"][-1] == tiny.EOS


def test_ingest_above_the_share_of_dropped_pairs_fails(local_ray, tmp_path, policy):
    with pytest.raises(StageError, match=r"1 of 4 rows dropped \(identical 1\)"):
        run(tmp_path, policy, [*GOOD[:3], BAD[3][0]], max_dropped=0.2)
