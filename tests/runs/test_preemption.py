"""A node of a training run is to be taken away: a checkpoint is written at the notice, and another node goes on from it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from dpo_ray import train_state
from dpo_ray.engines.policies import PolicyRef

from ..waiting import wait_until
from .command import write_jsonl
from .conftest import ROOT, Cluster, start_cluster

pytestmark = pytest.mark.slow
NOTICE_S = 10


@pytest.fixture
def spot() -> Iterator[Cluster]:
    """A head without CPUs, and two nodes of which each has room for the one worker."""
    for cluster in start_cluster("--num-cpus=0"):
        with ExitStack() as nodes:
            for _ in range(2):
                nodes.enter_context(cluster.join("--num-cpus=2", "--labels=pool=train"))
            yield cluster


def node_of_worker(cluster: Cluster) -> str | None:
    alive = [a.node_id for a in cluster.state("actors") if a.class_name == "RayTrainWorker" and a.state == "ALIVE"]
    return alive[0] if len(alive) == 1 else None


def test_notice_of_a_nodes_end_is_answered_with_a_checkpoint_that_another_node_goes_on_from(
    spot: Cluster, policy: PolicyRef, tmp_path: Path
) -> None:
    rows = [{"prompt": f"w10 w{11 + i}", "chosen": f"w50 w{20 + i}", "rejected": f"w60 w{30 + i}"} for i in range(32)]
    source = write_jsonl(tmp_path / "pairs.jsonl", rows)
    train = {"beta": 0.1, "learning_rate": 1e-4, "dtype": "float32", "epochs": 100_000, "global_batch_size": 4}
    # No checkpoint is due before the notice, and workers may not fail: the loss of the node is none of their failures.
    train |= {"checkpoint_steps": 10**6, "max_failures": 0}
    train |= {"resources": {"workers": 1, "cpus": 1.5, "node_labels": {"pool": "train"}}}
    tree = {"name": "run", "root": str(tmp_path), "policy": policy.path, "train": train}
    tree["preferences"] = {"kind": "explicit", "source": str(source), "eval_pairs": 8}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    metrics = tmp_path / "run/round_00/train/metrics.jsonl"

    def records() -> list[train_state.Record]:
        state = next((tmp_path / "run/round_00/train/state").glob("attempt-*"), tmp_path / "none")
        return [record for _, record in train_state.committed(str(state)) if record]

    def logged() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "pipelines/full_round.py", str(tmp_path / "run.yaml")]
        run = subprocess.Popen(command, cwd=ROOT, env=spot.env, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(lambda: logged() > 20, 180)
            node = node_of_worker(spot)
            assert node is not None
            assert records() == []
            drain = [str(spot.bin / "python"), "-m", "ray.scripts.scripts", "drain-node", "--node-id", node]
            drain += [
                "--address",
                spot.env["RAY_ADDRESS"],
                "--reason",
                "DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message",
                "spot",
            ]
            subprocess.run([*drain, f"--deadline-remaining-seconds={NOTICE_S}"], env=spot.env, check=True, capture_output=True)
            wait_until(lambda: len(records()) == 1, NOTICE_S)
            (saved,) = records()
            assert saved.step > 20
            wait_until(lambda: node_of_worker(spot) not in (None, node), 120)
            wait_until(lambda: saved.step < logged() < saved.step + 10_000 and metrics.stat().st_mtime > drain_over(saved), 120)
        finally:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait(30)
    assert records() == [saved], (tmp_path / "log").read_text()[-2000:]
    steps = [line.partition('"step": ')[2].partition(",")[0] for line in metrics.read_text().splitlines()]
    whole = [int(step) for step in steps if step]
    assert whole == list(range(1, len(whole) + 1)), "every step once"


def drain_over(saved: train_state.Record) -> float:
    return datetime.fromisoformat(saved.committed_at).timestamp() + NOTICE_S
