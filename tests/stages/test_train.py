"""Ray Train fits on one small table; what a step computes is tested in tests/learn."""

import json
import math
import os
import shutil
import signal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from dpo_ray import train_state
from dpo_ray.config import RunConfig, Train
from dpo_ray.engines.policies import PolicyRef, policy_ref
from dpo_ray.errors import ConfigError, NonFiniteLossError, StageError
from dpo_ray.learn.dpo import dpo_steps
from dpo_ray.learn.logps import Path
from dpo_ray.learn.losses import Term
from dpo_ray.learn.objective import Objective
from dpo_ray.learn.optim import build_optimizer, learning_rate_at
from dpo_ray.learn.policy import load_policy
from dpo_ray.learn.policy_files import policy_identity
from dpo_ray.pair_table import columns_of
from dpo_ray.schemas import REFERENCED
from dpo_ray.stages import train
from dpo_ray.train_objectives import start_tolerance
from dpo_ray.train_worker import plan_steps

from ..artifacts import commit, commit_policy, commit_tables, context
from ..learn import tiny
from ..processes import titled
from ..test_config import minimal
from ..test_train_log import points
from . import rows

pytestmark = pytest.mark.usefixtures("one_thread")  # as a worker with one CPU sums, to which a loop in this process is compared
PAIRS = tiny.build_pairs(10, seed=1)
BLOCK = {"beta": 0.1, "learning_rate": 2e-3, "global_batch_size": 4, "max_batch_tokens": 64, "epochs": 2, "dtype": "float32"}
BLOCK |= {"checkpoint_steps": 4}  # of 6 steps


def referenced(policy=None):
    """The pairs with the policy's own log-probabilities as reference, or with made-up ones."""
    columns = zip(PAIRS.pair_id, PAIRS.prompt_token_ids, PAIRS.chosen_token_ids, PAIRS.rejected_token_ids, strict=True)
    made = [rows.pair_row(*row) for row in columns]
    model = AutoModelForCausalLM.from_pretrained(policy.path).eval() if policy else None
    for i, row in enumerate(made):
        for side in ("chosen", "rejected"):
            value = tiny.naive_logps(model, row["prompt_token_ids"], row[f"{side}_token_ids"]) if model else -float(i)
            row[f"ref_{side}_logps"] = value
        row["reference_id"] = policy.identity if policy else "reference"
    return pa.Table.from_pylist(made, REFERENCED)


@pytest.mark.parametrize("world_size", [1, 2])
def test_plan_steps_every_epoch_has_every_row_once_in_global_batches(world_size):
    plan = plan_steps(tiny.pair_lengths(PAIRS), Train.model_validate(BLOCK), world_size, seed=0, share_prompt=True)
    batches = [sorted(row for micro in step for batch in micro for row in batch) for step in plan]
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(row for b in epoch for row in b) == list(range(10))
    assert batches[:3] != batches[3:]


def test_plan_steps_pairs_of_a_step_do_not_depend_on_the_number_of_workers():
    def pairs(world_size):
        plan = plan_steps(tiny.pair_lengths(PAIRS), Train.model_validate(BLOCK), world_size, seed=0, share_prompt=True)
        return [sorted(row for micro in step for batch in micro for row in batch) for step in plan]

    assert pairs(1) == pairs(2) == pairs(3)


def tables(directory, ids, planned=None):
    """Committed pairs, one file for each list of reference ids."""
    made = referenced().slice(0, 1).drop_columns("reference_id")
    files = [
        made.take(pa.array([0] * len(own), pa.int64())).append_column("reference_id", pa.array(own, pa.string())) for own in ids
    ]
    return commit_tables(directory, files, inputs=planned and {"reference": planned})


@pytest.mark.parametrize("planned", ["a", None])
def test_reference_of_one_policy_is_named(tmp_path, planned):
    assert train.check_reference(tables(tmp_path, [["a", "a"], ["a"]], planned)) == "a"


@pytest.mark.parametrize(
    ("ids", "planned", "said"),
    [
        ([["a", "b"], ["a"]], "a", "are of a, b; expected a alone"),
        ([["a"], ["b"]], None, "are of a, b; expected one policy alone"),
        ([["b"]], "a", "are of b; expected a alone"),
        ([[]], None, "are of no policy; expected one policy alone"),
    ],
    ids=["in one file", "between files", "stale", "none"],
)
def test_reference_of_another_policy_or_of_several_is_refused(tmp_path, ids, planned, said):
    with pytest.raises(StageError, match=rf"{said}. .*--redo reference"):
        train.check_reference(tables(tmp_path, ids, planned))


@pytest.mark.parametrize(
    ("dtype", "reuse", "reference", "tolerance"),
    [
        ("float32", "none", "start", 1e-3),
        ("float32", "sampler", "start", 5e-2),
        ("bfloat16", "none", "start", 5e-2),
        ("float32", "none", "initial", None),
        ("float32", "none", None, None),
    ],
)
def test_first_loss_is_known_where_the_reference_is_the_start(dtype, reuse, reference, tolerance):
    config = RunConfig.model_validate(minimal() | {"train": BLOCK | {"dtype": dtype}})
    config = config.model_copy(update={"reference": config.reference.model_copy(update={"reuse": reuse})})
    assert start_tolerance(config, reference, "start") == tolerance


# Real fits: few, since Ray Train takes far longer to start than these pairs to train on


LONG = {"epochs": 50, "checkpoint_steps": 10, "learning_rate": 1e-4}  # 150 steps


@pytest.fixture(scope="module")
def fit(local_ray, tmp_path_factory, policy):
    """The stage on two workers: directory and output."""
    directory = tmp_path_factory.mktemp("train")
    return directory, run(directory, policy, 2)


@pytest.fixture(scope="module")
def killed(fit, tmp_path_factory, policy):
    """The stage of another config, where the other left its checkpoints, with SIGKILL in its middle: directory and victim.

    Of [1, 2] workers of 3 CPUs one fits on the four there are.
    """
    directory = tmp_path_factory.mktemp("killed") / "train"
    shutil.copytree(fit[0], directory)
    victims = []

    def kill(done):
        if done > 150 and not victims:
            victims.append(titled("RayTrainWorker")[0])
            os.kill(victims[0].pid, signal.SIGKILL)

    run(directory, policy, (1, 2), "f2", progress=kill, cpus=3, **LONG)
    return directory, victims


def run(directory, policy, workers, fingerprint="f1", progress=None, table=None, **options):
    """Run the stage. `progress` is called with the pairs that are done; `options` are of the block, and cpus."""
    inputs = {
        "pairs": commit_tables(directory / "pairs", [referenced(policy) if table is None else table]),
        "policy": commit_policy(directory / "start", policy.path, policy.identity),
    }
    resources = {"workers": workers, "cpus": options.pop("cpus", 1)}
    config = RunConfig.model_validate(minimal() | {"train": BLOCK | options | {"resources": resources}})
    given = context(directory, inputs, fingerprint=fingerprint)
    if progress:
        given.progress.update = lambda done, total, counters: progress(done)
    return train.stage(config, 0, "policy", "round_00/reference").run(given)


def saved(directory, fingerprint="f1"):
    """Records of the checkpoints, by name, newest first."""
    return dict(train_state.committed(f"{directory}/state/attempt-{fingerprint}"))


def log(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def alone(policy, **options):
    """The same training in this process, without Ray and FSDP: its metrics and its model."""
    block = Train.model_validate(BLOCK | options)
    model = load_policy(policy.path, dtype=torch.float32)
    pairs = referenced(policy)
    plan = plan_steps(tiny.pair_lengths(PAIRS), block, 1, seed=0, share_prompt=True)

    def fetch(indices):
        taken = pairs.take(indices)
        return type(PAIRS)(**{c: taken[c].to_pylist() for c in columns_of(block)})

    steps = dpo_steps(
        model,
        build_optimizer(model, learning_rate=block.learning_rate, weight_decay=0.0, betas=block.adam_betas),
        fetch,
        plan,
        Path(share_prompt=False, tiled_head=False),
        Objective([Term("sigmoid")], block.beta),
        tiny.pair_lengths(PAIRS),
        learning_rate_for=lambda step: learning_rate_at(
            step, len(plan), peak=block.learning_rate, warmup_steps=block.num_warmup_steps(len(plan)), schedule="cosine"
        ),
        max_grad_norm=block.max_grad_norm,
        pad_token_id=tiny.PAD,
        device="cpu",
    )
    return [metrics for read in steps for metrics in read], model.eval()


def test_train_first_step_starts_at_ln_2(fit, killed):
    for directory in (fit[0], killed[0]):
        assert log(directory)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert log(directory)[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_train_two_workers_and_a_plain_loop_take_the_same_steps(fit, policy):
    two, plain = log(fit[0]), alone(policy)[0]
    assert len(two) == 6
    assert abs(two[-1]["kl_ref_to_policy"]) > 0.01
    check_same_steps(two, plain)


def check_same_steps(got, plain):
    assert len(got) == len(plain)
    for metric in ("loss", "grad_norm", "learning_rate", "num_tokens", "logps/chosen"):
        np.testing.assert_allclose([m[metric] for m in got], [m[metric] for m in plain], rtol=1e-5, err_msg=metric)
    kl = [[m["kl_ref_to_policy"] for m in metrics] for metrics in (got, plain)]
    np.testing.assert_allclose(*kl, atol=1e-5)  # a difference near 0 of log-probabilities near -30


def test_train_logs_progress_tokens_and_speed_of_every_step(fit, killed):
    """6 steps of 4, 4 and 2 pairs, twice; the checkpoint after the fourth is the first read, the end the second."""
    check_steps(log(fit[0]), BLOCK, workers=2)
    check_steps(log(killed[0]), BLOCK | LONG, workers=1)
    steps = log(fit[0])
    for read in (steps[:4], steps[4:]):
        tokens = sum(m["num_tokens"] for m in read)
        for metrics in read:
            assert metrics["tokens_per_s"] * metrics["step_time_s"] * len(read) == pytest.approx(tokens)


def check_steps(steps, block, workers):
    plan = plan_steps(tiny.pair_lengths(PAIRS), Train.model_validate(block), workers, seed=0, share_prompt=True)
    assert [m["step"] for m in steps] == list(range(1, len(plan) + 1))
    assert [m["epoch"] for m in steps] == pytest.approx([m["step"] / 3 for m in steps])
    for metrics, step in zip(steps, plan, strict=True):
        prompts = sum(len(PAIRS.prompt_token_ids[i]) for micro in step for rows in micro for i in rows)
        assert metrics["tokens_saved"] == pytest.approx(prompts / metrics["num_tokens"])
        assert metrics["padding"] == 0
        assert 0 < metrics["mfu"] < 1.5  # of a measured peak, and tiny matrices are far from it
        assert 0.05 < metrics["peak_memory_gib"] < 64


def test_train_logs_to_tensorboard_what_it_logs_to_its_lines(fit):
    directory, _ = fit
    seen = points(directory)
    for name in ("loss", "rewards/margins", "tokens_per_s"):
        expected = {m["step"]: m[name] for m in log(directory)}
        assert seen[f"train/{name}"] == pytest.approx(expected, rel=1e-6)


def test_train_learns_the_pairs(fit):
    metrics = log(fit[0])
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.05
    assert metrics[-1]["rewards/margins"] > 0.1


SPEED = {"step_time_s", "tokens_per_s", "mfu", "peak_memory_gib"}
"""What depends on how fast this machine is at the moment."""


def check_same(got, want):
    """Rewards are differences of log-probabilities near -30: their rounding is absolute. Largest measured: 2.4e-8. The KL
    is such a difference without beta = 0.1.
    """
    for mine, theirs in zip(got, want, strict=True):
        assert mine.keys() == theirs.keys()
        assert mine["kl_ref_to_policy"] == pytest.approx(theirs["kl_ref_to_policy"], rel=1e-5, abs=1e-5)
        names = mine.keys() - SPEED - {"kl_ref_to_policy"}
        assert {n: mine[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-5, abs=1e-6)


def test_train_killed_goes_on_from_its_own_checkpoint_on_another_number_of_workers(fit, tmp_path, policy):
    """Two workers wrote the checkpoint of step 4, one goes on; what the two had logged stays to the last bit."""
    shutil.copytree(fit[0], tmp_path / "killed")
    last, first = saved(tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed/state/attempt-f1" / last)
    for gone in ("policy", "identity.json", "metrics.jsonl"):
        path = tmp_path / "killed" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    output = run(tmp_path / "killed", policy, 1)
    records = saved(tmp_path / "killed")
    assert [(record.step, record.world_size) for record in records.values()] == [(6, 1), (4, 2)]
    assert list(records)[1] == first
    assert log(tmp_path / "killed")[:4] == log(fit[0])[:4]
    check_same(log(tmp_path / "killed"), log(fit[0]))
    assert output.metrics["identity"] == policy_identity(tmp_path / "killed/policy")


def test_train_never_resumes_the_checkpoint_of_another_round_or_config(fit, killed, policy):
    """Its steps are those of a training from the start, on one worker as in a plain loop."""
    assert saved(killed[0]) == saved(fit[0])
    check_same_steps(log(killed[0]), alone(policy, **LONG)[0])


def test_train_whose_worker_is_killed_recovers_on_as_many_workers_as_fit(killed):
    directory, victims = killed
    assert victims
    assert [(record.step, record.world_size) for record in saved(directory, "f2").values()] == [(150, 1), (140, 1)]


@pytest.mark.slow
def test_train_finished_takes_no_step_and_only_exports(fit, tmp_path, policy):
    shutil.copytree(fit[0], tmp_path / "finished")
    shutil.rmtree(tmp_path / "finished/policy")
    output = run(tmp_path / "finished", policy, 1)
    assert saved(tmp_path / "finished") == saved(fit[0])
    assert log(tmp_path / "finished") == log(fit[0])
    assert output.metrics["identity"] == fit[1].metrics["identity"]


def test_train_that_meets_a_loss_that_is_not_finite_stops_at_once_and_names_the_pairs(local_ray, tmp_path, policy):
    """At once: were it tried again, Ray's own error would say how often workers failed."""
    with pytest.raises(NonFiniteLossError, match=r"^step 1: loss nan.* for pairs pair-"):
        run(tmp_path, policy, 1, learning_rate=1e30)


@pytest.mark.slow
def test_train_refuses_a_reference_that_is_not_of_the_policy_it_claims(local_ray, tmp_path, policy):
    made = referenced(policy)
    column = made.schema.get_field_index("ref_chosen_logps")
    made = made.set_column(column, made.schema.field(column), pc.subtract(made["ref_chosen_logps"], pa.scalar(1, pa.float32())))
    with pytest.raises(StageError, match=r"the loss of step 0 must be 0.693147 within 0.001; got 0.64"):
        run(tmp_path, policy, 1, table=made)


def test_train_exported_policy_loaded_by_transformers_gives_the_trained_logits(fit, policy):
    directory, _ = fit
    loaded = AutoModelForCausalLM.from_pretrained(directory / "policy").eval()
    trained = alone(policy)[1]
    ids = torch.tensor([[1, *PAIRS.prompt_token_ids[0], *PAIRS.chosen_token_ids[0]]])
    with torch.no_grad():
        got, want, start = (m(input_ids=ids).logits for m in (loaded, trained, load_policy(policy.path, dtype=torch.float32)))
    assert (got - want).abs().max() < 1e-4
    assert (got - start).abs().max() > 0.01  # it did move
    assert AutoTokenizer.from_pretrained(directory / "policy").chat_template == tiny.CHAT_TEMPLATE


def test_train_output_names_the_policy_by_its_contents_and_lists_its_files(fit):
    directory, output = fit
    assert output.metrics["identity"] == policy_identity(directory / "policy")
    assert {f.path for f in output.files} >= {"policy/config.json", "policy/model.safetensors", "policy/tokenizer.json"}
    assert all((directory / f.path).stat().st_size == f.bytes for f in output.files)
    assert (output.rows_in, output.rows_out, output.metrics["steps"]) == (10, 10, 6)
    ref = policy_ref(commit(directory, output.files, output.metrics), trust_remote_code=False)
    assert (ref.path, ref.identity) == (f"{directory}/policy", output.metrics["identity"])
    assert output.metrics["last_loss"] == log(directory)[-1]["loss"]
    assert output.metrics["tokens"] == sum(m["num_tokens"] for m in log(directory))


@pytest.mark.slow
def test_train_budget_below_the_longest_pair_names_it_before_any_step(local_ray, tmp_path, policy):
    tokens = tiny.pair_lengths(PAIRS).sum(1)
    with pytest.raises(ConfigError, match=rf"max_batch_tokens=15 .* pair-{tokens.argmax()} has {tokens.max()} tokens"):
        run(tmp_path, policy, 1, max_batch_tokens=15)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_train_policy_that_cannot_be_sharded_is_refused_in_one_line_at_the_first_try(local_ray, tmp_path):
    config = OpenAIGPTConfig(vocab_size=tiny.VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path / "gpt")
    tiny.build_tokenizer().save_pretrained(tmp_path / "gpt")
    policy = PolicyRef(str(tmp_path / "gpt"), policy_identity(tmp_path / "gpt"))
    with pytest.raises(ConfigError, match=r"^OpenAIGPTLMHeadModel has no list of decoder layers .*use a policy.*$"):
        run(tmp_path, policy, 2, table=referenced())
    assert not (tmp_path / "policy").exists()
