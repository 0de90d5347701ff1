"""A node joins while one elastic worker trains: two go on from its checkpoint, with the same batches and learning rates."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dpo_ray import train_state
from dpo_ray.engines.policies import PolicyRef
from dpo_ray.learn.optim import learning_rate_at

from ..waiting import wait_until
from .command import write_jsonl
from .conftest import ROOT, Cluster, start_cluster

pytestmark = pytest.mark.slow
PAIRS, BATCH, EPOCHS = 24, 5, 4000  # more steps than the test waits for
STEPS = EPOCHS * 5  # batches of 5, 5, 5, 5 and 4 pairs


@pytest.fixture
def small_cluster() -> Iterator[Cluster]:
    """Room for one worker of 3 CPUs."""
    yield from start_cluster("--num-cpus=4")


def records(state: Path) -> list[train_state.Record]:
    return [record for _, record in train_state.committed(str(state)) if record]


def test_elastic_training_goes_on_with_a_node_that_joins(small_cluster: Cluster, policy: PolicyRef, tmp_path: Path) -> None:
    rows = [{"prompt": f"w10 w{11 + i}", "chosen": f"w50 w{20 + i}", "rejected": f"w60 w{30 + i}"} for i in range(PAIRS + 8)]
    source = write_jsonl(tmp_path / "pairs.jsonl", rows)
    train = {"beta": 0.1, "learning_rate": 1e-4, "dtype": "float32", "epochs": EPOCHS, "global_batch_size": BATCH}
    train |= {"checkpoint_steps": 50, "resources": {"workers": [1, 2], "cpus": 3}}
    tree = {"name": "run", "root": str(tmp_path), "policy": policy.path, "train": train}
    tree["preferences"] = {"kind": "explicit", "source": str(source), "eval_pairs": 8}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "pipelines/full_round.py", str(tmp_path / "run.yaml")]
    join = [str(small_cluster.bin / "python"), "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=4"]
    join += [f"--address={small_cluster.env['RAY_ADDRESS']}", "--node-ip-address=127.0.0.1"]
    started = []

    def start(arguments: list[str]) -> None:
        with (tmp_path / f"{len(started)}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    arguments, cwd=ROOT, env=small_cluster.env, stdout=log, stderr=log, start_new_session=True, text=True
                )
            )

    def state() -> Path:
        return next((tmp_path / "run/round_00/train/state").glob("attempt-*"), tmp_path / "none")

    try:
        start(command)
        wait_until(lambda: len(records(state())) > 0, 120)
        assert records(state())[0].world_size == 1
        start(join)
        wait_until(lambda: len(records(state())) > 0 and records(state())[0].world_size == 2, 240)
    finally:
        for process in reversed(started):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
    name, record = train_state.committed(str(state()))[0]
    assert record is not None
    log = [json.loads(line) for line in (state() / name / train_state.LOG).read_text().splitlines()]
    assert len(log) == record.step
    rates = [learning_rate_at(i, STEPS, peak=1e-4, warmup_steps=STEPS // 10, schedule="cosine") for i in range(record.step)]
    assert [metrics["learning_rate"] for metrics in log] == rates
    epochs = [sum(m["num_tokens"] for m in log[i : i + 5]) for i in range(0, record.step - 4, 5)]
    assert len(set(epochs)) == 1, "every epoch has every pair once"
