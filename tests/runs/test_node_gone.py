"""A node ends under a stage: what it held counts as given back, and an engine that was on it is closed without it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_ray.engines.policies import PolicyRef

from .conftest import ROOT, Cluster, start_cluster

pytestmark = pytest.mark.slow
DRIVER = """
import sys
import ray
from dpo_ray.engines.policies import PolicyRef
from dpo_ray.engines.pool import EnginePool
from dpo_ray.engines.requests import EngineSettings
from dpo_ray.flow import cluster, fit

cluster.connect()
idle = cluster.Idle()
settings = EngineSettings("hf", "float32", 64, {}, 1, 0.0, 1.0, 2, False, {"pool": "in(a,b)"})
pool = EnginePool(settings, PolicyRef(sys.argv[1], "p"), 2, 2)
nodes = {node.labels.get("pool"): node.id for node in fit.live_nodes()}
print("started", len({where for where, _ in pool.processes[:2]}), flush=True)
sys.stdin.readline()  # a node is killed here
pool.close()
print("closed", flush=True)
idle.wait("the engines", timeout_s=60)
cluster.probe_shared(sys.argv[2])
print("given back", sorted(node.labels.get("pool", "head") for node in fit.live_nodes()), flush=True)
"""


@pytest.fixture
def two() -> Iterator[Cluster]:
    yield from start_cluster("--num-cpus=0")


def test_engine_and_resources_of_a_node_that_is_gone_hold_nothing_up(two: Cluster, policy: PolicyRef, tmp_path: Path) -> None:
    with two.join("--num-cpus=1", "--labels=pool=a"), two.join("--num-cpus=1", "--labels=pool=b") as doomed:
        arguments = [sys.executable, "-c", DRIVER, policy.path, str(tmp_path / "root")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        driver = subprocess.Popen(arguments, cwd=ROOT, env=two.env, text=True, **pipes)
        assert driver.stdout is not None
        assert driver.stdout.readline() == "started 2\n"
        os.killpg(doomed.pid, signal.SIGKILL)
        out, err = driver.communicate("go on\n", timeout=200)
        said = [line for line in out.splitlines() if line.startswith(("closed", "given back"))]  # Ray says more, to stdout too
        assert said == ["closed", "given back ['a', 'head']"], err[-3000:]
