"""What the actor computes and caches, called in this process, and the stage around it on real Ray Data.

A Ray actor that computes imports torch and transformers first, which takes far longer than these pairs.
"""

import numpy as np
import pyarrow as pa
import pytest
import torch

from dpo_ray.config import RunConfig
from dpo_ray.engines.hf import HfEngine
from dpo_ray.engines.policies import PolicyRef
from dpo_ray.engines.requests import EngineSettings, Request
from dpo_ray.errors import StageError
from dpo_ray.logps_actor import LogpsActor
from dpo_ray.logps_cache import completion_key, read_cache
from dpo_ray.sampler_logps import SIDES, choose_probe
from dpo_ray.stages import reference

from ..artifacts import commit_policy, commit_tables, context, kept
from ..learn import tiny
from ..test_config import minimal
from . import rows


@pytest.fixture(scope="module", autouse=True)
def as_before(one_thread):
    """The actor chooses how its process multiplies matrices: not for the tests after these."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def make_pairs():
    made = tiny.build_pairs(12, seed=3)
    columns = zip(made.pair_id, made.prompt_token_ids, made.chosen_token_ids, made.rejected_token_ids, strict=True)
    return [rows.pair_row(*row) for row in columns]


def config_of(root, train=(), generate=(), **block):
    train = minimal()["train"] | {"dtype": "float32"} | dict(train)
    block = {"max_batch_tokens": 40} | block
    return RunConfig.model_validate(
        minimal() | {"root": str(root), "train": train, "generate": dict(generate), "reference": block}
    )


def run(directory, policy, pairs, root, rows_per_part=5, actors=1, **fields):
    """Run the stage: its output and its rows."""
    resources = {"rows_per_part": rows_per_part, "cpus": 1, "actors": actors}
    inputs = {
        "pairs": commit_tables(directory / "pairs", [rows.preferences(pairs)]),
        "reference": commit_policy(directory / "policy", policy.path, policy.identity),
    }
    stage = reference.stage(config_of(root, resources=resources, **fields), 0, "policy")
    output = stage.run(context(directory / "out", inputs))
    return output, kept(directory / "out", output)


def compute(policy, pairs, root, rows_per_part=5, actors=1, **fields):
    """What actors of the stage make of the pairs, part by part, in turn: how many values they computed, and their rows."""
    how, table = reference.own_how(config_of(root, **fields), policy.identity), rows.preferences(pairs)
    made = [LogpsActor(policy, how, reference.LOGPS_COLUMNS, use_gpu=False, cpus=1) for _ in range(actors)]
    parts = [table.slice(at, rows_per_part) for at in range(0, len(pairs), rows_per_part)]
    done = pa.concat_tables([made[i % actors](part) for i, part in enumerate(parts)])
    return sum(done[reference.COMPUTED].to_pylist()), done.to_pylist()


def values(got):
    return {r["pair_id"]: (r["ref_chosen_logps"], r["ref_rejected_logps"]) for r in got}


@pytest.fixture(scope="module")
def referenced(local_ray, tmp_path_factory, policy):
    """What the stage makes of the pairs, with values per token: its output and its rows."""
    directory = tmp_path_factory.mktemp("referenced")
    return run(directory, policy, make_pairs(), directory, per_token=True)


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
    assert output.metrics == {"tokens": sum(sizes), "computed": 2 * len(pairs)}
    check_tokens(got)


def test_reference_logps_do_not_depend_on_order_parts_or_batches(tmp_path, policy, referenced):
    pairs, (_, one) = make_pairs(), referenced
    shuffled = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    computed, other = compute(policy, shuffled, tmp_path, rows_per_part=7, max_batch_tokens=10**6)
    assert computed == 2 * len(pairs)
    found = values(other)
    assert found.keys() == {r["pair_id"] for r in one}
    for r in one:
        assert found[r["pair_id"]] == pytest.approx((r["ref_chosen_logps"], r["ref_rejected_logps"]), abs=1e-4)


def test_reference_logps_computed_before_are_not_computed_again(tmp_path, policy):
    """Paired anew, over three shards and in another order: only what was never seen is computed, and no value moves."""
    pairs = make_pairs()
    first, one = compute(policy, pairs, tmp_path)
    anew = [
        {**p, "pair_id": f"{p['pair_id']} turned", "chosen_token_ids": p["rejected_token_ids"], "rejected_token_ids": [5, 6, i]}
        for i, p in enumerate(pairs)
    ]
    rng = np.random.default_rng(1)
    mixed = [[*pairs, *anew][i] for i in rng.permutation(2 * len(pairs))]
    second, two = compute(policy, mixed, tmp_path, rows_per_part=8, actors=3)
    assert first == 2 * len(pairs)
    assert second == len(anew)
    found = values(two)
    for key, (chosen, rejected) in values(one).items():
        assert found[key] == (chosen, rejected)
        assert found[f"{key} turned"][0] == rejected
    third, three = compute(policy, mixed, tmp_path)
    assert third == 0
    assert values(three) == found


@pytest.mark.parametrize("change", ["weights", "dtype", "version", "root", "off"])
def test_reference_logps_of_another_definition_are_computed(tmp_path, policy, change, monkeypatch):
    pairs = make_pairs()[:2]
    compute(policy, pairs, tmp_path)
    how = {"root": tmp_path}
    if change == "weights":
        policy = policy._replace(identity="of other weights")
    elif change == "version":
        monkeypatch.setattr("dpo_ray.logps_cache.LOGPS_VERSION", 99)
    else:
        how |= {"dtype": {"train": {"dtype": "bfloat16"}}, "root": {"root": tmp_path / "other"}, "off": {"cache": False}}[
            change
        ]
    assert compute(policy, pairs, **how)[0] == 4


def check_tokens(got):
    for row in got:
        for side in ("chosen", "rejected"):
            tokens = row[f"ref_{side}_token_logps"]
            assert len(tokens) == len(row[f"{side}_token_ids"])
            assert sum(tokens) == pytest.approx(row[f"ref_{side}_logps"], rel=1e-5)


def test_reference_logps_per_token_sum_to_those_of_the_completion(tmp_path, policy):
    """Asked for by LD-DPO; values that were cached without them are computed again."""
    pairs = make_pairs()[:3]
    _, plain = compute(policy, pairs, tmp_path)
    assert {r["ref_chosen_token_logps"] for r in plain} == {None}
    computed, got = compute(policy, pairs, tmp_path, train={"ld_alpha": 0.5})
    assert computed == 6
    check_tokens(got)
    assert compute(policy, pairs, tmp_path, per_token=True)[0] == 0


def test_reference_logps_that_are_not_finite_are_an_error_that_names_the_pair(tmp_path):
    model = tiny.build_model("llama")
    model.lm_head.weight.data[:] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tiny.build_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(StageError, match=r"chosen_token_ids of pair-0 has the log-probability nan; expected a finite value"):
        compute(PolicyRef(str(tmp_path / "broken"), "broken"), make_pairs()[:1], tmp_path)


def test_count_tokens_reads_the_prompt_twice():
    table = rows.preferences([rows.pair_row("a", [1, 2, 3], [4], [5, 6]), rows.pair_row("b", [1], [4], [5])])
    table = table.append_column(reference.COMPUTED, pa.array([2, 1]))
    assert reference.count_tokens(table) == {"tokens": (6 + 3) + (2 + 2), "computed": 3}


# Values taken over from the engine


SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.2, "max_new_tokens": 9}
SAMPLING |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "stop": (), "stop_token_ids": (11,), "logps": True}


@pytest.fixture(scope="module")
def sampled(policy, one_thread):
    """Pairs that the fallback engine sampled, not at temperature 1, with what it said of them."""
    settings = EngineSettings("hf", "float32", 40, {}, 1, 0.0, 1.0, 1, closed=False)
    requests = [Request([1, 10 + i, 20 + i, 30 + i], seed=1000 * i, n=2) for i in range(40)]
    answers = HfEngine(settings, policy).generate(requests, SAMPLING)
    return [
        rows.pair_row(
            f"pair-{i}",
            request.prompt_token_ids,
            *(sample.token_ids for sample in pair),
            **{f"{side}_sampler_logps": sample.logps_sum for side, sample in zip(SIDES, pair, strict=True)},
            sampler_id=policy.identity,
        )
        for i, (request, pair) in enumerate(zip(requests, answers, strict=True))
    ]


@pytest.fixture(scope="module")
def probed(sampled):
    """The sampled pairs that a stage on all of them probes."""
    ids = set(choose_probe([p["pair_id"] for p in sampled]))
    return [p for p in sampled if p["pair_id"] in ids]


def reuse(directory, policy, pairs, root, **fields):
    return run(directory, policy, pairs, root, generate={"sampler_logps": True}, reuse="sampler", **fields)


@pytest.fixture(scope="module")
def reused(local_ray, tmp_path_factory, policy, sampled, probed):
    """The stage on all sampled pairs, of which the last that is not probed has a made-up value: root, output and rows."""
    directory = tmp_path_factory.mktemp("reused")
    last = max(i for i, p in enumerate(sampled) if p not in probed)
    pairs = [p | {"chosen_sampler_logps": -123.0} if i == last else p for i, p in enumerate(sampled)]
    return directory, *reuse(directory, policy, pairs, directory)


def test_reference_reuse_takes_over_what_the_engine_said(reused, tmp_path, policy, sampled, probed):
    _, output, got = reused
    assert len(probed) == 32
    _, computed = compute(policy, sampled, tmp_path)
    assert [r["pair_id"] for r in got] == [p["pair_id"] for p in sampled]
    last = max(i for i, p in enumerate(sampled) if p not in probed)
    assert got[last]["ref_chosen_logps"] == -123.0, "only probed pairs are computed"
    for row, exact in zip(got, computed, strict=True):
        for side in ("chosen", "rejected"):
            assert row[f"ref_{side}_logps"] == np.float32(row[f"{side}_sampler_logps"])
            if row is not got[last]:
                assert row[f"ref_{side}_logps"] == pytest.approx(exact[f"ref_{side}_logps"], abs=1e-4)
            assert row[f"ref_{side}_token_logps"] is None
    assert {r["reference_id"] for r in got} == {policy.identity}
    assert output.rows_in == output.rows_out == len(sampled)
    assert output.metrics["probe_pairs"] == 32
    assert output.metrics["computed"] == 64
    assert abs(output.metrics["sampler_bias"]) < 1e-5
    assert max(output.metrics["sampler_error_p99"], output.metrics["sampler_length_reward"]) < 1e-5
    assert {f.path.split("/")[0] for f in output.files} == {f.path for f in output.files}, "the probe is not of the output"


def cached(root, policy):
    return read_cache(reference.own_how(config_of(root), policy.identity).cache)


def test_reference_reuse_caches_what_it_computed(reused, policy, probed):
    keys = {completion_key(p["prompt_token_ids"], p[f"{side}_token_ids"]) for p in probed for side in SIDES}
    assert cached(reused[0], policy).keys() == keys


def test_reference_reuse_of_a_biased_engine_is_refused_with_its_figures_and_a_way_out(reused, tmp_path, policy, probed):
    """Shorter completions of a pair are rejected ones here, so an error in every token would reward length.

    Few pairs are probed all. The way out, in the same directory, computes no value that a probe has computed before.
    """
    pairs = [
        p | {f"{side}_sampler_logps": p[f"{side}_sampler_logps"] - 0.1 * len(p[f"{side}_token_ids"]) for side in SIDES}
        for p in probed[:5]
    ]
    with pytest.raises(StageError, match=r"by a probe of 5 pairs: biased by -0\.1 nats a token.*--reference.reuse none"):
        reuse(tmp_path, policy, pairs, reused[0])
    output, got = run(tmp_path, policy, pairs, reused[0], rows_per_part=2, actors=[1, 3])
    assert output.metrics["computed"] == 0
    assert [r["pair_id"] for r in got] == [p["pair_id"] for p in pairs]
    known = cached(reused[0], policy)
    for row in got:
        for side in SIDES:
            entry = known[completion_key(row["prompt_token_ids"], row[f"{side}_token_ids"])]
            assert row[f"ref_{side}_logps"] == np.float32(entry.logps)


def test_reference_reuse_of_pairs_that_another_policy_sampled_is_refused(tmp_path, policy, sampled):
    pairs = [p | {"sampler_id": "another"} if i == 20 else p for i, p in enumerate(sampled)]
    with pytest.raises(StageError, match="pair-20 was sampled by another, expected the reference"):
        reuse(tmp_path, policy, pairs, tmp_path)
