"""Nodes with labels and fake GPUs: a stage lands on the pool that it names, and is refused where that has too few GPUs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray.quickstart.policy import build_policy

from ..runs.conftest import ROOT, Cluster, start_cluster
from .rounds import config

pytestmark = pytest.mark.chaos
POOLS = {"cpu": 0, "inference": 1, "train": 1}
"""GPUs of the node of each."""


ON_CPU = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
ON_CPU |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
"""What an engine without a GPU sets for itself: vLLM's CPU build runs here on a GPU that Ray alone believes in."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The quickstart's, hardly taught: vLLM's attention on a CPU takes no smaller heads."""
    directory = tmp_path_factory.mktemp("policy") / "tiny"
    build_policy(directory, seed=0, num_steps=1)
    return str(directory)


@pytest.fixture(scope="module")
def pools() -> Iterator[Cluster]:
    for cluster in start_cluster("--num-cpus=0", added=ON_CPU):
        with ExitStack() as nodes:
            for pool, gpus in POOLS.items():
                size = ("--num-cpus=2", f"--num-gpus={gpus}", "--memory=4000000000", "--object-store-memory=100000000")
                nodes.enter_context(cluster.join(*size, f"--labels=dpo-ray/pool={pool}"))
            yield cluster


def on(pool: str, **resources: Any) -> dict[str, Any]:
    return {"node_labels": {"dpo-ray/pool": pool}, **resources}


def placed(directory: Path, policy: str) -> dict[str, Any]:
    tree = config(directory, policy) | {"root": str(directory / "root"), "prompts_per_round": 16}
    tree["prompts"]["resources"] = on("cpu")
    tree["generate"] |= {
        "engine": "vllm",
        "max_prompt_tokens": 64,
        "engine_args": {"enforce_eager": True, "enable_chunked_prefill": False},
    }
    tree["generate"]["resources"] = on("inference", gpus=1, cpus=1, rows_per_part=8)
    tree["score"]["resources"] |= on("cpu")
    tree["pair"]["resources"] = on("cpu")
    tree["reference"]["resources"] |= on("inference")
    tree["train"]["resources"] = on("train", workers=2, cpus=1)
    return tree


def command(pools: Cluster, directory: Path, tree: dict[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    (directory / "run.yaml").write_text(yaml.safe_dump(tree))
    run = [sys.executable, "pipelines/full_round.py", str(directory / "run.yaml"), *arguments]
    return subprocess.run(run, cwd=ROOT, env=pools.env, capture_output=True, text=True, timeout=240)


def test_stage_with_a_gpu_runs_on_its_pool_and_the_others_on_theirs(pools: Cluster, policy: str, tmp_path: Path) -> None:
    done = command(pools, tmp_path, placed(tmp_path, policy), "--until", "train")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert json.loads((tmp_path / "root/run/round_00/train/_manifest.json").read_text())["rows_out"] > 0
    pool = {node.node_id: node.labels.get("dpo-ray/pool", "head") for node in pools.state("nodes")}
    where: dict[str, set[tuple[str, float]]] = {}
    for actor in pools.state("actors"):
        asked = (actor.required_resources or {}).get("GPU", 0)
        where.setdefault(actor.class_name.rpartition(".")[2], set()).add((pool[actor.node_id], asked))
    assert where["EngineActor"] == {("inference", 1)}
    assert where["RayTrainWorker"] == {("train", 0)}


def test_training_with_more_gpus_than_its_pool_has_is_refused_and_with_fewer_is_not(
    pools: Cluster, policy: str, tmp_path: Path
) -> None:
    tree = placed(tmp_path, policy)
    tree["train"]["resources"] = on("train", workers=2, cpus=1, gpus=1)
    done = command(pools, tmp_path, tree, "--dry-run")
    assert done.returncode == 1
    assert "round_00/train needs 2 train worker x 1 CPU + 1 GPU on dpo-ray/pool=train, but only 1 fit" in done.stderr
    assert not (tmp_path / "root/run").exists()

    tree["train"]["resources"] = on("train", workers=1, cpus=1, gpus=1)
    assert command(pools, tmp_path, tree, "--dry-run").returncode == 0
