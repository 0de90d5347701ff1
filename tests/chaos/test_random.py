"""Faults at random moments, on random processes of a round; the table and the test's name have the seed."""

import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from dpo_ray.engines.policies import PolicyRef

from ..processes import family, title
from ..runs.conftest import Cluster, start_cluster
from .faults import SOON, Fault, Moment, kill, raylet_below
from .rounds import ONE_A_NODE, config, hashes, running

pytestmark = pytest.mark.chaos
FAULTS, PAUSE_S = 3, (2.0, 14.0)
"""How many faults a run has, and how long after the last one was overcome the next one comes."""
VICTIMS = ("a worker process", "a worker process", "a raylet", "the driver")
MEMORY = ("--memory=2000000000", "--object-store-memory=100000000")
RAYS_OWN = {"ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent"}
"""Not of the round; a raylet ends with its agents, and is a victim itself."""


@pytest.fixture
def head() -> Iterator[Cluster]:
    yield from start_cluster("--num-cpus=0", *MEMORY, added=SOON)


def at_work(cluster: Cluster, nodes: list[subprocess.Popen[bytes]]) -> list[tuple[str, int]]:
    """Name and pid of every process that has a task or an actor: on the nodes, and on the head, where the driver is."""
    every = [process for pid in (cluster.pid, *(node.pid for node in nodes)) for process in family(pid)]
    named = [(title(process).split(" ")[0], process.pid) for process in every]
    return sorted((name, pid) for name, pid in named if name.startswith("ray::") and name not in RAYS_OWN)


def test_round_under_random_faults_ends_in_the_same_policy(
    head: Cluster, undisturbed: Path, policy: PolicyRef, tmp_path: Path, record: Callable[[Fault], None], seed: int
) -> None:
    chance = random.Random(seed)
    tree = config(tmp_path, policy.path, engines=2)
    tree["generate"]["resources"]["cpus"] = tree["train"]["resources"]["cpus"] = ONE_A_NODE
    with ExitStack() as stack:
        nodes = [stack.enter_context(head.join("--num-cpus=2", *MEMORY)) for _ in range(3)]
        run = stack.enter_context(running(head, tmp_path, tree))
        for _ in range(FAULTS):
            with suppress(subprocess.TimeoutExpired):
                run.process.wait(chance.uniform(*PAUSE_S))
            if run.process.poll() == 0:
                break
            what, there = chance.choice(VICTIMS), at_work(head, nodes)
            name, pid = chance.choice(there) if there else ("the driver", run.process.pid)
            lost = chance.choice(nodes)
            if what == "a raylet":
                name, pid = what, raylet_below(lost.pid)
            elif what == "the driver":
                name, pid = what, run.process.pid
            moment = Moment(run, run.stage(), f"kill -9 of {name} (seed {seed})")
            kill(pid)
            if name == "a raylet":
                nodes.remove(lost)
                nodes.append(stack.enter_context(head.join("--num-cpus=2", *MEMORY)))
            elif name == "the driver":
                run.process.wait(30)
                run = stack.enter_context(running(head, tmp_path, tree))
            record(moment.recovered(run))
        run.completes()
        assert hashes(run.directory) == hashes(undisturbed)
