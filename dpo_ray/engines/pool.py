"""A pool of engine actors: started together, shared by stages, closed with proof that nothing is left.

Each actor is one engine and asks Ray for the CPUs and GPUs of it; vLLM's own executor spans the GPUs inside the actor,
so there is no placement group that could outlive it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpo_ray.engines.actors import Companion, EngineActor, Family, load_failure, outlast
from dpo_ray.engines.policies import PolicyRef
from dpo_ray.engines.render import Rendered
from dpo_ray.engines.requests import EngineSettings, Request, Sample
from dpo_ray.errors import ResourceError, StageError
from dpo_ray.flow.fit import free_places
from dpo_ray.flow.stage import Needs

MAX_CRASHES = 32
"""Of all engines of a pool together; beyond it the engines are broken, not single prompts."""
PIECES = 4
"""Into how many a part is cut that crashed its engine; a crash costs a start, a piece one short call."""
MAX_COMPANION_DEATHS = 8
CLOSE_TIMEOUT_S = 30.0


class Process:
    """Names one process for good: a pid alone is reused."""

    def __init__(self, pid: int, created: float) -> None:
        self.pid, self.created = pid, created

    def alive(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < 0.01 and process.status() != psutil.STATUS_ZOMBIE
            return process if same else None
        except psutil.NoSuchProcess:
            return None


class EnginePool:
    """Handles to the running engines, all of one policy. Pickles into Ray Data tasks; only the driver's copy changes it."""

    def __init__(self, settings: EngineSettings, policy: PolicyRef, min_actors: int, max_actors: int) -> None:
        self.settings = settings
        self.count = max(min_actors, min(max_actors, _free_places(settings)))
        self.actors: list[ActorHandle] = []
        self.processes: list[Family] = []
        self._start(policy)

    def use(self, policy: PolicyRef) -> None:
        """Sample from `policy` from now on. Engines of another one are closed and as many new ones started."""
        if policy.identity != self.policy.identity:
            self.close()
            self._start(policy)

    def _start(self, policy: PolicyRef) -> None:
        settings, self.policy = self.settings, policy
        where = dict(settings.node_labels)
        companion = ray.remote(Companion).options(num_cpus=0, max_restarts=MAX_COMPANION_DEATHS, label_selector=where)
        self.companion: ActorHandle = companion.remote(policy)
        actor = ray.remote(EngineActor).options(
            num_cpus=settings.cpus,
            num_gpus=settings.gpus,
            max_concurrency=settings.parts_in_flight + 4,
            max_restarts=MAX_CRASHES + 1,
            label_selector=where,
        )
        self.actors = [actor.remote(settings, policy, self.companion) for _ in range(self.count)]
        try:
            self.processes = ray.get([a.processes.remote() for a in [*self.actors, self.companion]])
        except RayActorError as error:
            self.close()
            raise StageError(_not_loaded(settings, policy, load_failure(error) or str(error).splitlines()[0])) from error

    def generate(
        self, requests: Sequence[Request], sampling: Mapping[str, Any], max_crashes: int = 2
    ) -> list[list[Sample] | None]:
        """Sample on the engine with the least to do; called from Ray Data tasks.

        Returns:
            The samples of each request, in order; None for one that crashed its engine `max_crashes` times, alone.

        Raises:
            StageError: the engines crashed more than MAX_CRASHES times.
        """
        try:
            return ray.get(self._least_loaded().generate.remote(requests, sampling))
        except RayActorError:
            return self._generate_alone(requests, sampling, max_crashes)

    def _generate_alone(
        self, requests: Sequence[Request], sampling: Mapping[str, Any], max_crashes: int
    ) -> list[list[Sample] | None]:
        """Sample with nothing else in the engine, so that a crash is these requests' own; cut them until one is left."""
        crashes, last = 0, None
        for _ in range(MAX_CRASHES):
            token, actor = uuid.uuid4().hex, self._least_loaded()
            try:
                outlast(actor.processes)  # waits while the engine starts again
                return ray.get(actor.generate_alone.remote(requests, sampling, token))
            except RayActorError as error:
                began, total = outlast(self.companion.crashed, token)
                if total > MAX_CRASHES:
                    raise StageError(_too_many_crashes(self.settings.kind, error)) from error
                last = load_failure(error)
            if not began:  # another call's crash took the engine while this one waited for its turn
                continue
            crashes += 1
            if len(requests) > 1:
                size = -(-len(requests) // PIECES)
                pieces = [requests[at : at + size] for at in range(0, len(requests), size)]
                return [samples for piece in pieces for samples in self._generate_alone(piece, sampling, max_crashes)]
            if crashes >= max_crashes:
                return [None]
        raise StageError(_not_loaded(self.settings, self.policy, last) if last else _too_many_crashes(self.settings.kind, None))

    def render(self, rows: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any], max_tokens: int) -> list[Rendered]:
        """Apply the policy's chat template to rows of `prompt` and `tools`; see render.py."""
        return outlast(self.companion.render, rows, template_kwargs, max_tokens)

    def restarts(self) -> int:
        """How often engines have started again since `use` last started them; 0 while that cannot be told."""
        try:
            restarts: Any = ray.get(self.companion.restarts.remote(), timeout=5)
            return restarts
        except (RayActorError, GetTimeoutError):
            return 0

    def _least_loaded(self) -> ActorHandle:
        if len(self.actors) == 1:
            return self.actors[0]
        loads: list[tuple[int, int]] = []
        for index, actor in enumerate(self.actors):
            try:
                load: Any = ray.get(actor.load.remote(), timeout=10)
                loads.append((load, index))
            except (RayActorError, GetTimeoutError):
                continue  # dead or starting again
        return self.actors[min(loads)[1] if loads else 0]

    def close(self) -> None:
        """Kill the engines and return when none of their processes is left, on any node.

        Raises:
            ResourceError: a process survived SIGKILL.
        """
        latest = []
        actors = [*self.actors, self.companion]
        for actor in actors:
            try:  # an engine that was started again has other processes than at first
                latest.append(ray.get(actor.processes.remote(), timeout=5))
            except (RayActorError, GetTimeoutError):
                continue
        for actor in actors:
            ray.kill(actor, no_restart=True)
        self.actors, known = [], [*self.processes, *latest]
        self.processes = []
        by_node: dict[str, set[tuple[int, float]]] = {}
        for node, family in known:
            by_node.setdefault(node, set()).update(family)
        for node, family in by_node.items():
            if left := _left_on(node, family):
                raise ResourceError(f"engine processes {left} on node {node} outlived SIGKILL; their memory is not free")


def _left_on(node: str, family: set[tuple[int, float]]) -> list[int]:
    """Processes of the family that outlive SIGKILL; none on a node that is gone, also where that shows only meanwhile."""
    if not _lives(node):
        return []
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    try:
        return ray.get(_reap.options(scheduling_strategy=here).remote(sorted(family), CLOSE_TIMEOUT_S))
    except RayError:
        if _lives(node):
            raise
        return []


def _lives(node: str) -> bool:
    return any(n["Alive"] for n in ray.nodes() if n["NodeID"] == node)


def _not_loaded(settings: EngineSettings, policy: PolicyRef, cause: str) -> str:
    return (
        f"the {settings.kind} engine could not load {policy.path}: {cause}. Check that the policy loads in {settings.kind} "
        "alone with the same engine_args, and that it fits the memory of its node. See the engine's own output in Ray's "
        "worker logs"
    )


def _too_many_crashes(kind: str, error: Exception | None) -> str:
    last = f" (the last: {str(error).strip().splitlines()[0]})" if error else ""
    return (
        f"generate: the {kind} engines crashed more than {MAX_CRASHES} times{last}, so it is not single prompts. See the "
        "engine's own output in Ray's worker logs; memory (engine_args, resources) and the policy's files are the usual reasons"
    )


@ray.remote(num_cpus=0, max_retries=2)
def _reap(family: list[tuple[int, float]], timeout_s: float) -> list[int]:
    """Wait for processes to end, kill those that do not within a few seconds, and return the survivors."""
    deadline = time.monotonic() + timeout_s
    grace = time.monotonic() + 3.0
    while True:
        left = [p for p in (Process(*f).alive() for f in family) if p]
        if not left or time.monotonic() > deadline:
            return [p.pid for p in left]
        if time.monotonic() > grace:
            for process in left:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
        time.sleep(0.05)


def _free_places(settings: EngineSettings) -> int:
    if not settings.cpus and not settings.gpus:
        return 1
    return free_places(Needs(1, settings.cpus, settings.gpus, node_labels=settings.node_labels))
