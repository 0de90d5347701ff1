import numpy as np
import pytest

from dpo_ray.config import RunConfig
from dpo_ray.engines.policies import PolicyRef
from dpo_ray.errors import StageError
from dpo_ray.stages import reference

from ..artifacts import commit_policy, commit_tables, context, kept
from ..learn import tiny
from ..test_config import minimal
from . import rows

pytestmark = pytest.mark.usefixtures("local_ray")


def make_pairs():
    made = tiny.build_pairs(12, seed=3)
    columns = zip(made.pair_id, made.prompt_token_ids, made.chosen_token_ids, made.rejected_token_ids, strict=True)
    return [rows.pair_row(*row) for row in columns]


def run(tmp_path, policy, pairs, rows_per_part=5, max_batch_tokens=40):
    resources = {"rows_per_part": rows_per_part, "cpus": 1}
    train = minimal()["train"] | {"dtype": "float32"}
    block = {"max_batch_tokens": max_batch_tokens, "resources": resources}
    config = RunConfig.model_validate(minimal() | {"train": train, "reference": block})
    inputs = {
        "pairs": commit_tables(tmp_path / "pairs", [rows.preferences(pairs)]),
        "reference": commit_policy(tmp_path / "policy", policy.path, policy.identity),
    }
    output = reference.stage(config, 0, "policy").run(context(tmp_path / "out", inputs))
    return output, kept(tmp_path / "out", output)


@pytest.fixture(scope="module")
def referenced(local_ray, tmp_path_factory, policy):
    """What the stage makes of the pairs: its output and its rows."""
    return run(tmp_path_factory.mktemp("referenced"), policy, make_pairs())


def test_reference_logps_are_those_of_one_plain_forward_a_row(referenced, policy):
    """Against a loop over tokens, row by row, with float64 log-softmax. Measured error: 3e-6 nats."""
    pairs, (output, got) = make_pairs(), referenced
    model = tiny.build_model("llama")
    assert [r["pair_id"] for r in got] == [p["pair_id"] for p in pairs]
    errors = [
        abs(row[f"ref_{side}_logps"] - tiny.naive_logps(model, row["prompt_token_ids"], row[f"{side}_token_ids"]))
        for row in got
        for side in ("chosen", "rejected")
    ]
    assert max(errors) <= 2e-3
    assert {r["reference_id"] for r in got} == {policy.identity}
    assert [{k: r[k] for k in pairs[0]} for r in got] == pairs
    sizes = [2 * len(p["prompt_token_ids"]) + len(p["chosen_token_ids"]) + len(p["rejected_token_ids"]) for p in pairs]
    assert output.metrics == {"tokens": sum(sizes)}


def test_reference_logps_do_not_depend_on_order_parts_or_batches(tmp_path, policy, referenced):
    pairs, (_, one) = make_pairs(), referenced
    shuffled = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    _, other = run(tmp_path, policy, shuffled, rows_per_part=7, max_batch_tokens=10**6)
    values = {r["pair_id"]: (r["ref_chosen_logps"], r["ref_rejected_logps"]) for r in other}
    assert values.keys() == {r["pair_id"] for r in one}
    for r in one:
        assert values[r["pair_id"]] == pytest.approx((r["ref_chosen_logps"], r["ref_rejected_logps"]), abs=1e-4)


def test_reference_logps_that_are_not_finite_are_an_error_that_names_the_pair(tmp_path):
    model = tiny.build_model("llama")
    model.lm_head.weight.data[:] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tiny.build_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(StageError, match=r"chosen_token_ids of pair-0 has the log-probability nan; expected a finite value"):
        run(tmp_path, PolicyRef(str(tmp_path / "broken"), "broken"), make_pairs()[:1])


def test_count_tokens_reads_the_prompt_twice():
    table = rows.preferences([rows.pair_row("a", [1, 2, 3], [4], [5, 6]), rows.pair_row("b", [1], [4], [5])])
    assert reference.count_tokens(table) == {"tokens": (6 + 3) + (2 + 2)}
