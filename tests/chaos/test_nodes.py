"""A node is lost in the middle of a stage, which goes on elsewhere; the head is lost, and another cluster goes on."""

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from dpo_ray.engines.policies import PolicyRef

from ..processes import family
from ..runs.conftest import Cluster, start_cluster
from .faults import SOON, Fault, Moment, actors, kill, kill_below, raylet_below
from .rounds import assert_every_pair_was_seen_once_an_epoch, config, hashes, running, spread_out

pytestmark = pytest.mark.chaos
SIZE = ("--num-cpus=2", "--memory=2000000000", "--object-store-memory=100000000")


def new_cluster() -> Iterator[Cluster]:
    yield from start_cluster("--num-cpus=0", "--memory=2000000000", "--object-store-memory=100000000", added=SOON)


def each(these: list[psutil.Process], act: str) -> None:
    """Call the method on every process that is still there."""
    for process in these:
        with suppress(psutil.NoSuchProcess):
            getattr(process, act)()


@pytest.fixture
def head() -> Iterator[Cluster]:
    yield from new_cluster()


@pytest.fixture
def other_head() -> Iterator[Cluster]:
    yield from new_cluster()


@pytest.fixture
def impatient() -> Iterator[Cluster]:
    """Its commands wait for a head that is gone for 20 s, and not for the minute that is Ray's default."""
    yield from start_cluster("--num-cpus=4", added={"RAY_gcs_rpc_server_reconnect_timeout_s": "20"})


def node_of(pid: int, nodes: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """The node, of these that the test started, that has this process."""
    (found,) = [node for node in nodes if pid in [p.pid for p in family(node.pid)]]
    return found


def test_round_that_loses_a_node_in_generate_and_a_raylet_in_train_ends_in_the_same_policy(
    head: Cluster, undisturbed: Path, policy: PolicyRef, tmp_path: Path, record: Callable[[Fault], None]
) -> None:
    with ExitStack() as stack:
        nodes = [stack.enter_context(head.join(*SIZE)) for _ in range(3)]
        run = stack.enter_context(running(head, tmp_path, spread_out(tmp_path, policy.path)))
        run.wait_for(lambda: len(run.parts("generate")) >= 2)
        engines = actors(head, "EngineActor")
        assert len(set(engines.values())) == 2
        lost = node_of(min(engines), nodes)
        moment = Moment(run, "generate", "kill -9 of a node")
        kill_below(lost.pid)
        record(moment.recovered(run, in_flight=2))
        nodes.remove(lost)

        nodes.append(stack.enter_context(head.join(*SIZE)))
        run.trains()
        workers = actors(head, "RayTrainWorker")
        assert len(set(workers.values())) == 2
        raylet = raylet_below(node_of(min(workers), nodes).pid)
        moment = Moment(run, "train", "kill -9 of a raylet")
        kill(raylet)
        record(moment.recovered(run))
        run.completes()
        assert hashes(run.directory) == hashes(undisturbed)


def test_round_whose_head_is_killed_goes_on_from_its_root_on_another_cluster(
    head: Cluster, other_head: Cluster, undisturbed: Path, policy: PolicyRef, tmp_path: Path, record: Callable[[Fault], None]
) -> None:
    """The nodes of the first cluster outlive it, as machines that stand still, and go on when those of the second train."""
    tree = spread_out(tmp_path, policy.path)
    with ExitStack() as stack:
        old, _ = ([stack.enter_context(cluster.join(*SIZE)) for _ in range(2)] for cluster in (head, other_head))
        run = stack.enter_context(running(head, tmp_path, tree))
        run.trains()
        assert len(actors(head, "RayTrainWorker")) == 2
        moment = Moment(run, "train", "kill -9 of head and driver, new cluster")
        still = [process for node in old for process in family(node.pid)]
        each(still, "suspend")
        run.kill()
        kill_below(head.pid)
        again = stack.enter_context(running(other_head, tmp_path, tree))
        record(moment.recovered(again))
        each(still, "resume")
        again.completes()
        assert hashes(again.directory) == hashes(undisturbed)
        assert_every_pair_was_seen_once_an_epoch(again.directory, undisturbed)


def test_command_whose_head_is_gone_says_so_and_ends(impatient: Cluster, policy: PolicyRef, tmp_path: Path) -> None:
    with running(impatient, tmp_path, config(tmp_path, policy.path), until="generate") as run:
        run.wait_for(lambda: len(run.parts("generate")) >= 1)
        kill_below(impatient.pid)
        assert run.ends(90) != 0
        assert re.search(r"the head of the cluster \(\S+\) has not answered for", run.tail())
