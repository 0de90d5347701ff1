"""A pool of engine actors: started together, shared by stages, closed with proof that nothing is left.

Each actor is one engine and asks Ray for the CPUs and GPUs of it; vLLM's own executor spans the GPUs inside the actor,
so there is no placement group that could outlive it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpo_ray.engines.policies import PolicyRef
from dpo_ray.engines.render import Rendered, render
from dpo_ray.engines.requests import EngineSettings, Request, Sample
from dpo_ray.errors import ResourceError, StageError

MAX_RESTARTS = 2
CLOSE_TIMEOUT_S = 30.0
Family = tuple[str, list[tuple[int, float]]]
"""A node's id, and pid and start time of each process of an actor there."""


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


class EngineActor:
    """An engine of either kind, with what the pool needs to find its processes again."""

    def __init__(self, settings: EngineSettings, policy: PolicyRef) -> None:
        if settings.kind == "vllm":
            from dpo_ray.engines.vllm import VllmEngine as Kind
        else:
            from dpo_ray.engines.hf import HfEngine as Kind
        self.engine = Kind(settings, policy)

    def generate(self, requests: Sequence[Request], sampling: Mapping[str, Any]) -> list[list[Sample]]:
        return self.engine.generate(requests, sampling)

    def load(self) -> int:
        return self.engine.load()

    def processes(self) -> Family:
        return _family()


class RenderActor:
    """Applies the chat template in a process of its own, with the tokenizer's libraries loaded once.

    In a thread of the engine's process it slows the engine's steps down, by Python's lock; in the short-lived tasks
    around the engines, loading the libraries costs seconds of CPU a process.
    """

    def __init__(self, policy: PolicyRef) -> None:
        self.policy = policy

    def render(self, rows: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any], max_tokens: int) -> list[Rendered]:
        return render(self.policy, rows, template_kwargs, max_tokens)

    def processes(self) -> Family:
        return _family()


def _family() -> Family:
    """This node's id, and pid and start time of this process and its children."""
    me = psutil.Process()
    family = [me, *me.children(recursive=True)]
    return ray.get_runtime_context().get_node_id(), [(p.pid, p.create_time()) for p in family]


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
        actor = ray.remote(EngineActor).options(
            num_cpus=settings.cpus,
            num_gpus=settings.gpus,
            max_concurrency=settings.parts_in_flight + 4,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,  # a call waits while its engine starts again; without it, it fails at once
        )
        self.actors = [actor.remote(settings, policy) for _ in range(self.count)]
        rendering = ray.remote(RenderActor).options(num_cpus=0, max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS)
        self.renderer: ActorHandle = rendering.remote(policy)
        try:
            self.processes = ray.get([a.processes.remote() for a in [*self.actors, self.renderer]])
        except RayActorError as error:
            self.close()
            raise StageError(
                f"the {settings.kind} engine could not load {policy.path}: {error}. Check that the policy loads in "
                f"{settings.kind} alone with the same engine_args, and that it fits the memory of its node"
            ) from error

    def generate(self, requests: Sequence[Request], sampling: Mapping[str, Any]) -> list[list[Sample]]:
        """Sample on the engine with the least to do; called from Ray Data tasks.

        Raises:
            StageError: every engine died, and again after its restarts.
        """
        error: Exception | None = None
        for _ in range(1 + MAX_RESTARTS):
            try:
                return ray.get(self._least_loaded().generate.remote(requests, sampling))
            except RayActorError as died:
                error = died
        raise StageError(f"engines died {1 + MAX_RESTARTS} times on one part of {len(requests)} prompts: {error}") from error

    def render(self, rows: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any], max_tokens: int) -> list[Rendered]:
        """Apply the policy's chat template to rows of `prompt` and `tools`; see render.py."""
        return ray.get(self.renderer.render.remote(rows, template_kwargs, max_tokens))

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
        actors = [*self.actors, self.renderer]
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
        alive_nodes = {n["NodeID"] for n in ray.nodes() if n["Alive"]}
        for node, family in by_node.items():
            if node not in alive_nodes:
                continue
            here = NodeAffinitySchedulingStrategy(node, soft=False)
            left = ray.get(_reap.options(scheduling_strategy=here).remote(sorted(family), CLOSE_TIMEOUT_S))
            if left:
                raise ResourceError(f"engine processes {left} on node {node} outlived SIGKILL; their memory is not free")


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
    free = ray.available_resources()
    by_cpu = free.get("CPU", 0) / settings.cpus if settings.cpus else float("inf")
    by_gpu = free.get("GPU", 0) / settings.gpus if settings.gpus else float("inf")
    places = min(by_cpu, by_gpu)
    return int(places) if places != float("inf") else 1
