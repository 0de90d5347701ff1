"""Ray Train fits on one small table; what a step computes is tested in tests/learn."""

import json
import math
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ray.config import RunConfig, Train
from dpo_ray.engines.policies import policy_ref
from dpo_ray.errors import StageError
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
from dpo_ray.train_worker import plan_steps, read_log, write_log

from ..artifacts import commit, commit_policy, commit_tables, context
from ..learn import tiny
from ..test_config import minimal
from . import rows

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
        row["reference_id"] = "reference"
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


def test_log_written_is_read_up_to_the_step_that_is_resumed(tmp_path):
    log = [{"loss": 0.5 - i / 10, "num_tokens": float(i)} for i in range(4)]
    write_log(str(tmp_path), log)
    assert read_log(str(tmp_path), 4) == log
    assert read_log(str(tmp_path), 2) == log[:2]
    assert read_log(str(tmp_path), 0) == []


def test_log_at_the_start_needs_no_file(tmp_path):
    assert read_log(str(tmp_path / "nowhere"), 0) == []


# Real fits


@pytest.fixture(scope="module")
def fit(local_ray, tmp_path_factory, policy):
    """Runs the stage on one and on two workers: number of workers -> (directory, output)."""
    made = {}
    for workers in (1, 2):
        directory = tmp_path_factory.mktemp("train")
        made[workers] = directory, run(directory, policy, workers)
    return made


def run(directory, policy, workers, fingerprint="f1", **fields):
    inputs = {
        "pairs": commit_tables(directory / "pairs", [referenced(policy)]),
        "policy": commit_policy(directory / "start", policy.path, policy.identity),
    }
    config = RunConfig.model_validate(minimal() | {"train": BLOCK | {"resources": {"workers": workers, "cpus": 1}} | fields})
    return train.stage(config, 0, "policy").run(context(directory, inputs, fingerprint=fingerprint))


def log(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def alone(policy):
    """The same training in this process, without Ray and FSDP: its metrics and its model."""
    block = Train.model_validate(BLOCK)
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
            step, len(plan), peak=block.learning_rate, warmup_ratio=0.1, schedule="cosine"
        ),
        max_grad_norm=block.max_grad_norm,
        pad_token_id=tiny.PAD,
        device="cpu",
    )
    return list(steps), model.eval()


def test_train_first_step_starts_at_ln_2(fit):
    for directory, _ in fit.values():
        assert log(directory)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert log(directory)[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_train_one_and_two_workers_and_a_plain_loop_take_the_same_steps(fit, policy):
    one, two, plain = log(fit[1][0]), log(fit[2][0]), alone(policy)[0]
    assert len(one) == len(two) == len(plain) == 6
    for metric in ("loss", "grad_norm", "learning_rate", "num_tokens", "logps/chosen"):
        values = np.array([[m[metric] for m in metrics] for metrics in (one, two, plain)])
        np.testing.assert_allclose(values[1:], np.broadcast_to(values[0], values[1:].shape), rtol=1e-5)


def test_train_learns_the_pairs(fit):
    metrics = log(fit[2][0])
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.05
    assert metrics[-1]["rewards/margins"] > 0.1


@pytest.mark.parametrize(("fingerprint", "resumes"), [("f1", True), ("f2", False)], ids=["same", "other"])
def test_train_again_goes_on_from_its_own_checkpoint_and_from_no_other(fit, tmp_path, policy, fingerprint, resumes):
    """Two workers wrote the checkpoint of step 4, one goes on; a mark in the log shows which steps were taken again.

    Rewards are differences of log-probabilities near -30: their rounding is absolute. Largest measured: 2.4e-8.
    """
    shutil.copytree(fit[2][0], tmp_path / "killed")
    steps = log(tmp_path / "killed")
    write_log(str(tmp_path / "killed"), [{**step, "mark": 1.0} for step in steps])
    shutil.rmtree(tmp_path / "killed/policy")
    output = run(tmp_path / "killed", policy, 1, fingerprint)
    again = log(tmp_path / "killed")
    assert [step.pop("mark", None) for step in again] == ([1.0] * 4 if resumes else [None] * 4) + [None] * 2
    for got, want in zip(again, steps, strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
    assert output.metrics["identity"] == policy_identity(tmp_path / "killed/policy")


def test_train_exported_policy_loaded_by_transformers_gives_the_trained_logits(fit, policy):
    directory, _output = fit[2]
    loaded = AutoModelForCausalLM.from_pretrained(directory / "policy").eval()
    trained = alone(policy)[1]
    ids = torch.tensor([[1, *PAIRS.prompt_token_ids[0], *PAIRS.chosen_token_ids[0]]])
    with torch.no_grad():
        got, want, start = (m(input_ids=ids).logits for m in (loaded, trained, load_policy(policy.path, dtype=torch.float32)))
    assert (got - want).abs().max() < 1e-4
    assert (got - start).abs().max() > 0.01  # it did move
    assert AutoTokenizer.from_pretrained(directory / "policy").chat_template == tiny.CHAT_TEMPLATE


def test_train_output_names_the_policy_by_its_contents_and_lists_its_files(fit):
    directory, output = fit[2]
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
    with pytest.raises(StageError, match=rf"max_batch_tokens=15 .* pair-{tokens.argmax()} has {tokens.max()} tokens"):
        run(tmp_path, policy, 1, max_batch_tokens=15)
    assert not (tmp_path / "metrics.jsonl").exists()
