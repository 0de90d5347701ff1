"""Rounds across hosts with addresses of their own: undisturbed, with a host that loses power, and with one that is cut off."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.engines.policies import PolicyRef

from ..runs.command import preference_round, write_jsonl
from ..runs.conftest import Cluster, start_cluster
from .faults import SOON, Fault, Moment, actors
from .hosts import Host, hosts, missing
from .rounds import ONE_A_NODE, Running, assert_every_pair_was_seen_once_an_epoch, hashes, running, spread_out

pytestmark = pytest.mark.chaos
SIZE = ("--memory=2000000000", "--object-store-memory=100000000")


@pytest.fixture(autouse=True)
def namespaces() -> None:
    if why := missing():
        pytest.skip(why)


@pytest.fixture
def machines() -> Iterator[list[Host]]:
    """A head, and three more."""
    with hosts(4) as made:
        yield made


@pytest.fixture
def head(machines: list[Host]) -> Iterator[Cluster]:
    first = machines[0]
    yield from start_cluster("--num-cpus=0", *SIZE, added=SOON, on=first.on, address=first.address)


def join(stack: ExitStack, cluster: Cluster, *joining: Host) -> None:
    for host in joining:
        stack.enter_context(cluster.join("--num-cpus=2", *SIZE, on=host.on, address=host.address))


def host_of(pid: int, machines: list[Host]) -> Host:
    (found,) = [host for host in machines if pid in host.pids()]
    return found


def hosts_of(cluster: Cluster, name: str, machines: list[Host]) -> list[Host]:
    """Where the living actors of a class are."""
    return [host_of(pid, machines) for pid in actors(cluster, name)]


def test_round_across_three_hosts_ends_in_the_policy_of_one(
    head: Cluster, machines: list[Host], undisturbed: Path, policy: PolicyRef, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        join(stack, head, *machines[1:3])
        tree = spread_out(tmp_path, policy.path)
        run = stack.enter_context(running(head, tmp_path, tree, on=machines[0].on, until="evaluate"))
        run.wait_for(lambda: run.steps() > 0)
        assert {h.name for h in hosts_of(head, "RayTrainWorker", machines)} == {h.name for h in machines[1:3]}
        run.completes()
        assert hashes(run.directory) == hashes(undisturbed)


def test_round_that_loses_two_hosts_and_is_cut_off_from_one_in_train_ends_in_the_same_policy(
    head: Cluster, machines: list[Host], undisturbed: Path, policy: PolicyRef, tmp_path: Path, record: Callable[[Fault], None]
) -> None:
    with ExitStack() as stack:
        join(stack, head, *machines[1:])
        tree = spread_out(tmp_path, policy.path)
        tree["reference"]["resources"] |= {"actors": 2, "cpus": ONE_A_NODE}
        run = stack.enter_context(running(head, tmp_path, tree, on=machines[0].on))
        run.wait_for(lambda: len(run.parts("generate")) >= 2)
        lost = hosts_of(head, "EngineActor", machines)[0]
        record(lose_power(lost, run, "generate"))
        join(stack, head, lost)

        run.wait_for(lambda: run.committed("pair") and len(actors(head, "LogpsActor")) == 2)  # they load; the rest is short
        lost = hosts_of(head, "LogpsActor", machines)[0]
        record(lose_power(lost, run, "reference"))
        join(stack, head, lost)

        cut_off_in_training(head, machines, run, record)
        run.completes()
        assert hashes(run.directory) == hashes(undisturbed)


def test_elastic_training_that_is_cut_off_from_a_host_sees_every_pair_once(
    head: Cluster, machines: list[Host], undisturbed: Path, policy: PolicyRef, tmp_path: Path, record: Callable[[Fault], None]
) -> None:
    with ExitStack() as stack:
        join(stack, head, *machines[1:3])
        tree = spread_out(tmp_path, policy.path, workers=(1, 2))
        run = stack.enter_context(running(head, tmp_path, tree, on=machines[0].on))
        cut_off_in_training(head, machines, run, record)
        run.completes()
        assert_every_pair_was_seen_once_an_epoch(run.directory, undisturbed)
        assert {record.world_size for record in run.saved()} == {1}


def test_training_across_hosts_whose_own_names_are_loopback_addresses(policy: PolicyRef, tmp_path: Path) -> None:
    """As Debian and Ubuntu have it: gloo takes the address of its host's name, at which no other host finds it."""
    rows = [{"prompt": f"w10 w{11 + i}", "chosen": f"w50 w{20 + i}", "rejected": f"w60 w{30 + i}"} for i in range(24)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    tree: dict[str, Any] = preference_round(tmp_path, policy.path) | {"name": "run"}
    tree["train"] |= {"resources": {"workers": 2, "cpus": ONE_A_NODE}, "max_setup_failures": 0}
    with hosts(3, own_name="127.0.1.1") as machines, ExitStack() as stack:
        first = machines[0]
        head = contextmanager(start_cluster)("--num-cpus=0", *SIZE, on=first.on, address=first.address)
        cluster = stack.enter_context(head)
        join(stack, cluster, *machines[1:])
        run = stack.enter_context(running(cluster, tmp_path, tree, on=first.on))
        run.completes()
        workers = {a.node_id for a in cluster.state("actors") if a.class_name == "RayTrainWorker"}
        assert len(workers) == 2


def lose_power(host: Host, run: Running, stage: str) -> Fault:
    """No connection to it sees an end. It can start again when the stage has gone on without it."""
    moment = Moment(run, stage, "a host loses power")
    host.unplug()
    host.kill()
    fault = moment.recovered(run, in_flight=2)
    host.plug()
    return fault


def cut_off_in_training(head: Cluster, machines: list[Host], run: Running, record: Callable[[Fault], None]) -> None:
    """Unplug a host with a worker while both train, until the others have gone on without it."""
    run.trains()
    both = hosts_of(head, "RayTrainWorker", machines)
    assert len({host.name for host in both}) == 2
    moment = Moment(run, "train", "a host is cut off")
    both[0].unplug()
    record(moment.recovered(run))
