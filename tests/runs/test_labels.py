"""A round on nodes with labels: each stage runs where its block says, and the head has no CPU."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from dpo_ray.engines.policies import PolicyRef

from .command import sampled_round, write_jsonl
from .conftest import ROOT, Cluster, start_cluster

pytestmark = pytest.mark.slow
POOLS = ("cpu", "inference", "train")
SCORER = """
import ray
def score(rows):
    assert ray.get_runtime_context().get_node_labels()["dpo-ray/pool"] == "cpu"
    return [float(len(row["completion"])) for row in rows]
"""


def on(pool: str) -> dict[str, dict[str, str]]:
    return {"node_labels": {"dpo-ray/pool": pool}}


@pytest.fixture
def pools() -> Iterator[Cluster]:
    for cluster in start_cluster("--num-cpus=0"):
        with ExitStack() as nodes:
            for pool in POOLS:
                nodes.enter_context(cluster.join("--num-cpus=2", f"--labels=dpo-ray/pool={pool}"))
            yield cluster


def test_stages_run_on_the_nodes_that_their_blocks_name(pools: Cluster, policy: PolicyRef, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"w10 w{11 + i}"} for i in range(24)])
    (tmp_path / "scorers.py").write_text(SCORER)
    tree = {"name": "run", "root": str(tmp_path / "root")} | sampled_round(tmp_path, policy.path)
    tree["prompts"] |= {"resources": on("cpu")}
    tree["generate"]["resources"] |= {"actors": 2, **on("inference")}
    tree["score"]["resources"] |= on("cpu")
    tree["pair"] |= {"resources": {"cpus": 0.5, **on("cpu")}}
    tree["reference"] = {"resources": on("inference")}
    tree["train"] |= {"resources": {"workers": [1, 2], "cpus": 1, **on("train")}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "pipelines/full_round.py", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, cwd=ROOT, env=pools.env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert json.loads((tmp_path / "root/run/round_00/train/_manifest.json").read_text())["rows_out"] > 0

    labels = {node.node_id: node.labels.get("dpo-ray/pool", "head") for node in pools.state("nodes")}
    assert sorted(labels.values()) == sorted((*POOLS, "head"))
    where: dict[str, set[str | None]] = {}
    for one in (o for o in (*pools.state("actors"), *pools.state("tasks")) if o.node_id):  # the others have not run
        where.setdefault(one.name if hasattr(one, "task_id") else one.class_name, set()).add(labels.get(one.node_id))
    placed = {
        "EngineActor": "inference",
        "Companion": "inference",
        "LogpsActor": "inference",
        "RayTrainWorker": "train",
        "_read_and_write": "cpu",
        "pair_table": "cpu",
    }
    found = {part: set().union(*(nodes for name, nodes in where.items() if part in name)) for part in placed}
    assert found == {part: {pool} for part, pool in placed.items()}, where


def test_stage_whose_labels_no_node_has_is_refused_before_anything_runs(
    pools: Cluster, policy: PolicyRef, tmp_path: Path
) -> None:
    tree = {"name": "run", "root": str(tmp_path / "root")} | sampled_round(tmp_path, policy.path)
    tree["train"] |= {"resources": on("trian")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "pipelines/full_round.py", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, cwd=ROOT, env=pools.env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "round_00/train needs 1 train worker x 1 CPU on dpo-ray/pool=trian, but only 0 fit" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "root/run").exists()
