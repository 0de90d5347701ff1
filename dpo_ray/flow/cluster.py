"""The Ray cluster under a run: connect to it, see that every node reads the root, and prove that a stage gave back all."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from ray._private.utils import read_ray_address
from ray.exceptions import RayError
from ray.util.placement_group import placement_group_table

from dpo_ray.errors import ResourceError
from dpo_ray.flow import head
from dpo_ray.flow.fit import Node, live_nodes

RELEASE_TIMEOUT_S = 60.0


def connect() -> None:
    """Join the cluster of RAY_ADDRESS or of a submitted job; else start a local Ray with this machine's cores."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else the C++ core warns of its own retries on stderr
    # A local Ray keeps this many idle workers; by default as many as CPUs, and each one more costs 3 s of CPU to start again.
    os.environ.setdefault("RAY_num_workers_soft_limit", "4")
    ray.init(
        address=_address(),
        runtime_env=worker_environment(),
        logging_level=logging.WARNING,
        log_to_driver=False,
        ignore_reinit_error=True,  # a notebook or test that has connected already keeps its connection
    )
    _quiet_ray_data()


def _address() -> str | None:
    """None, by which Ray looks for the cluster itself; `local` where it would find one that is gone, and wait for minutes."""
    if os.environ.get("RAY_ADDRESS") or ray.is_initialized():
        return None
    started = read_ray_address()  # what `ray start` wrote down on this machine, and `ray stop` deletes
    if not started or head.answers(started, timeout_s=5.0):
        return None
    logging.getLogger(__name__).warning(
        "the Ray cluster that was started on this machine (%s) does not answer; this run starts a Ray of its own", started
    )
    return "local"


def worker_environment() -> dict[str, Any]:
    """Ray's runtime_env for the workers of this driver."""
    environment: dict[str, Any] = {"env_vars": {**QUIET, **WATCHFUL}}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # a submitted job brings its code in its working_dir
        return environment
    checkout = str(Path(__file__).resolve().parents[2])
    environment["env_vars"]["PYTHONPATH"] = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")]))
    if " " in sys.executable and "RAY_ADDRESS" not in os.environ:
        environment["py_executable"] = shlex.quote(sys.executable)  # Ray pastes it into a shell command as it is
    return environment


WATCHFUL = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
"""A node may have half a minute from notice to end; Ray Train would look every 5 s."""
QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def _quiet_ray_data() -> None:
    import ray.data  # only to quiet it: the driver prints its own progress

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []  # they advise on memory that these stages bound themselves
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def held_placement_groups() -> set[str]:
    """Ids of the placement groups that hold or wait for resources."""
    return {i for i, g in placement_group_table().items() if g["state"] not in ("REMOVED",)}


def used_resources() -> dict[str, float]:
    """CPUs and GPUs that something holds, on nodes that live."""
    nodes = live_nodes()
    return {k: sum(n.total.get(k, 0) - n.free.get(k, 0) for n in nodes) for k in ("CPU", "GPU")}


class Idle:
    """What was held before a stage, to compare with after it, whatever nodes came or went (a snapshot; holds nothing)."""

    def __init__(self) -> None:
        self.used = used_resources()
        self.groups = held_placement_groups()

    def wait(self, what: str, timeout_s: float = RELEASE_TIMEOUT_S) -> None:
        """Return when CPUs, GPUs and placement groups are as they were.

        Raises:
            ResourceError: they are not within `timeout_s`; the message names what is still held.
        """
        deadline = time.monotonic() + timeout_s
        while missing := self._missing():
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"{what} ended, but after {timeout_s:g} s still holds {', '.join(missing)}. "
                    "See `ray list actors` and `ray list placement-groups` for the holder"
                )
            time.sleep(0.1)

    def _missing(self) -> list[str]:
        held = [f"{v - self.used[k]:g} {k}" for k, v in used_resources().items() if v > self.used[k] + 1e-6]
        return held + [f"placement group {g}" for g in sorted(held_placement_groups() - self.groups)]


def probe_shared(root: str) -> None:
    """Write a file below `root` and read it from every node, so that a path only the driver sees fails here.

    Raises:
        ResourceError: the root cannot be written, or a node does not see it.
    """
    from dpo_ray.flow import storage

    probe = f"{root}/.probe-{os.getpid()}"
    try:
        storage.write_bytes(probe, b"dpo-ray")
    except OSError as error:
        raise ResourceError(
            f"root {root} cannot be written: {error}. Choose another `root`, or mend its permissions"
        ) from error
    try:
        for node, error in _read_on_every_node(probe):
            raise ResourceError(
                f"root {root} is not seen by node {node}: {error}. Use a path on shared storage, or a URI such as s3://"
            )
    finally:
        storage.delete_file(probe)


def _read_on_every_node(probe: str) -> Iterable[tuple[str, str]]:
    """(node, error) for every node that could not read the probe."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=0, max_retries=0)
    def read() -> str | None:
        from dpo_ray.flow import storage

        try:
            return None if storage.read_bytes(probe) == b"dpo-ray" else "it reads other bytes"
        except OSError as error:
            return str(error)

    nodes = live_nodes()
    affinity = [NodeAffinitySchedulingStrategy(n.id, soft=False) for n in nodes]
    asked = [read.options(scheduling_strategy=a).remote() for a in affinity]
    answers = [_answer(one, node) for one, node in zip(asked, nodes, strict=True)]
    return [(node.address, a) for node, a in zip(nodes, answers, strict=True) if a]


def _answer(asked: Any, node: Node) -> str | None:
    """What a node said; nothing where it is gone meanwhile."""
    try:
        return ray.get(asked)
    except RayError as error:
        return str(error).splitlines()[0] if node.id in {n.id for n in live_nodes()} else None
