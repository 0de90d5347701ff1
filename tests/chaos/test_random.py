"""Faults at random moments against random processes of a run; the seed is in the test's name and in its table rows."""

import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from dpo_ray.engines.policies import PolicyRef

from ..runs.conftest import Cluster, start_cluster
from .faults import SOON, Fault, Moment, kill, processes, raylet_below, title
from .rounds import Running, config, hashes, running

pytestmark = pytest.mark.chaos
FAULTS, PAUSE_S = 3, (2.0, 14.0)
"""How many a run, and from how long to how long after the last one was overcome."""
SIZE = ("--num-cpus=2", "--memory=2000000000", "--object-store-memory=100000000")


@pytest.fixture
def head() -> Iterator[Cluster]:
    yield from start_cluster("--num-cpus=0", "--memory=2000000000", "--object-store-memory=100000000", added=SOON)


def working(cluster: Cluster, nodes: list[psutil.Popen]) -> dict[int, str]:
    """Pid and what it is of every process that runs a task or actor: on the nodes, and beside the driver."""
    found = {}
    for node in (cluster.pid, *(n.pid for n in nodes)):
        for process in processes(node):
            what = title(process).removeprefix("ray::")
            if title(process).startswith("ray::") and what.split(":")[0] not in IDLE:
                found[process.pid] = what.split(" ")[0]
    return found


IDLE = {"IDLE", "DashboardAgent", "RuntimeEnvAgent"}
"""Ray's own: a raylet dies with its agents, which is a victim of its own."""


def test_round_under_random_faults_ends_in_the_same_policy(
    head: Cluster, undisturbed: Path, policy: PolicyRef, tmp_path: Path, record: Callable[[Fault], None], seed: int
) -> None:
    chance = random.Random(seed)
    tree = config(tmp_path, policy.path, engines=2)
    tree["generate"]["resources"]["cpus"] = tree["train"]["resources"]["cpus"] = 1.5
    with ExitStack() as stack:
        nodes = [stack.enter_context(head.join(*SIZE)) for _ in range(3)]
        run = stack.enter_context(running(head, tmp_path, tree))
        for _ in range(FAULTS):
            with suppress(subprocess.TimeoutExpired):
                run.process.wait(chance.uniform(*PAUSE_S))
            if run.process.poll() == 0:
                break
            victim = chance.choice(["a worker", "a worker", "a raylet", "the driver"])
            moment, run = strike(victim, chance, stack, head, nodes, run, tmp_path, tree, seed)
            record(moment.recovered(run))
        run.completes()
        assert hashes(run.directory) == hashes(undisturbed)


def strike(
    victim: str,
    chance: random.Random,
    stack: ExitStack,
    head: Cluster,
    nodes: list[psutil.Popen],
    run: Running,
    directory: Path,
    tree: dict,
    seed: int,
) -> tuple[Moment, Running]:
    """Carry it out; the command that goes on."""
    if victim == "a worker" and (there := working(head, nodes)):
        pid = chance.choice(sorted(there))
        moment = Moment(run, run.stage(), f"seed {seed}: kill -9 of {there[pid]}")
        with suppress(ProcessLookupError):
            kill(pid)
    elif victim == "a raylet":
        lost = chance.choice(nodes)
        moment = Moment(run, run.stage(), f"seed {seed}: kill -9 of a raylet")
        kill(raylet_below(lost.pid))
        nodes.remove(lost)
        nodes.append(stack.enter_context(head.join(*SIZE)))
    else:
        moment = Moment(run, run.stage(), f"seed {seed}: kill -9 of the driver")
        run.kill()
        run = stack.enter_context(running(head, directory, tree))
    return moment, run
