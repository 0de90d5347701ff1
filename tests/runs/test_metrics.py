"""Prometheus reads what a stage counts from the node's metrics port, by the names and tags of the dashboard."""

import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from ..waiting import wait_until
from .conftest import ROOT, Cluster, _free_port, start_cluster

pytestmark = pytest.mark.slow
DRIVER = """
import sys
from dpo_ray.flow import cluster, metrics
from dpo_ray.flow.stage import Stage, StageOutput
from tests.artifacts import Silent
cluster.connect()
stage = metrics.Measured(Silent(), "my-run", Stage("train", 1, 1, {}, {}, lambda context: StageOutput([], 0, 0, {})))
stage.update(0, 64, {})
stage.update(32, 64, {"tokens": 640.0, "dropped": 2.0, "rewards/margins": 0.25, "kl_ref_to_policy": 1.5, "step_time_s": 0.75})
stage.restarted(3)
stage.idle()
sys.stdin.read()
"""
WANTED = {
    "ray_dpo_ray_rows_total": 32,
    "ray_dpo_ray_tokens_total": 640,
    "ray_dpo_ray_dropped_total": 2,
    "ray_dpo_ray_engine_restarts_total": 3,
    "ray_dpo_ray_reward_margin": 0.25,
    "ray_dpo_ray_kl": 1.5,
    "ray_dpo_ray_step_seconds": 0.75,
    "ray_dpo_ray_idle_share": 1.0,
}


@pytest.fixture
def port() -> int:
    return _free_port()


@pytest.fixture
def small(port: int) -> Iterator[Cluster]:
    yield from start_cluster("--num-cpus=2", f"--metrics-export-port={port}")


def test_prometheus_reads_every_metric_with_its_tags(small: Cluster, port: int) -> None:
    def read() -> dict[str, float]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                lines = answer.read().decode().splitlines()
        except urllib.error.URLError:  # the node's agent starts behind the node
            return {}
        found = {}
        for line in lines:
            if match := re.match(r"(ray_dpo_ray_\w+)\{(.*)\} (\S+)$", line):
                tags = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
                if (tags["run"], tags["round"], tags["stage"]) == ("my-run", "1", "train"):
                    found[match[1]] = float(match[3])
        return found

    driver = subprocess.Popen([sys.executable, "-c", DRIVER], cwd=ROOT, env=small.env, stdin=subprocess.PIPE)
    try:
        wait_until(lambda: read() == WANTED, 60)
    finally:
        driver.kill()
        driver.wait()
