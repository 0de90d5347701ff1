"""Find one process of a cluster, kill it, and measure what that costs the run."""

import os
import signal
import time
from contextlib import suppress
from typing import NamedTuple

import psutil

from ..processes import family, titled
from ..runs.conftest import Cluster
from .rounds import PART, PROMPTS, Running

SOON = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}
"""Environment of nodes and commands, in which a host that is silent counts as gone within a quarter of a minute. By Ray's
own the head takes one minute, and who waits for an answer from there up to seven."""


FEW_STEPS = 10
"""More than can be logged between the look at a run and the fault."""
NUM_PARTS = PROMPTS // PART


class Fault(NamedTuple):
    """A line of the table."""

    fault: str
    stage: str
    lost: str
    seconds: float


class Moment:
    """What a run had in a stage when a fault struck it; made just before the fault."""

    def __init__(self, run: Running, stage: str, fault: str) -> None:
        self.stage, self.fault = stage, fault
        self.parts, self.steps = run.parts(stage), run.steps()
        self.saved = max((record.step for record in run.saved()), default=0)
        self.began = time.monotonic()

    def recovered(self, run: Running, *, in_flight: int = 1) -> Fault:
        """Wait until the run, by this command or another, is further in the stage than it was.

        Args:
            in_flight: parts that were worked on: the next ones in order, all of which must be committed.
        """
        if self.stage == "train":
            run.wait_for(lambda: run.steps() > self.steps + FEW_STEPS or run.committed("train"))
            lost = f"{self.steps - self.saved} steps since the checkpoint of step {self.saved}"
        else:
            names = {f"part-{i:05d}" for i in range(min(len(self.parts) + in_flight, NUM_PARTS))}
            run.wait_for(lambda: names <= run.parts(self.stage).keys() or run.committed(self.stage))
            again = self.parts.items() - run.parts(self.stage).items()
            assert not again, "what was committed is not made again"
            lost = f"{in_flight} of {NUM_PARTS} parts, in flight; {len(again)} of {len(self.parts)} committed"
        return Fault(self.fault, self.stage, lost, time.monotonic() - self.began)


def pids(cluster: Cluster, part_of_title: str) -> list[int]:
    """Workers below the head whose title has this, such as EngineActor; those of other nodes: see `actors`."""
    return [process.pid for process in titled(part_of_title, pid=cluster.pid)]


def actors(cluster: Cluster, name: str) -> dict[int, str]:
    """Process and node of each living actor of a class, on any node."""
    return {a.pid: a.node_id for a in cluster.state("actors") if name in a.class_name and a.state == "ALIVE" and a.pid}


def kill(pid: int) -> None:
    """SIGKILL, to a process that may have ended meanwhile."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_below(pid: int) -> None:
    """SIGKILL to a process and all below it, as when a machine loses power: `ray start --block` is above its whole node."""
    for process in family(pid):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def raylet_below(pid: int) -> int:
    (found,) = [p.pid for p in family(pid) if p.name() == "raylet"]
    return found
