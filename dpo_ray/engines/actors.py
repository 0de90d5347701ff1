"""The processes of a pool: engines, and one companion beside them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError

from dpo_ray.engines.policies import PolicyRef
from dpo_ray.engines.render import Rendered, render
from dpo_ray.engines.requests import EngineSettings, Request, Sample
from dpo_ray.errors import StageError, raised_last

START_RETRIES = 2
MAX_CAUSE_CHARS = 600
UNREACHABLE_S, PAUSE_S = 180.0, 1.0
"""How long a call of an actor is tried again while nothing reaches its host, which counts as dead after a minute."""
Family = tuple[str, list[tuple[int, float]]]
"""A node's id, and pid and start time of each process of an actor there."""


def outlast(method: Any, *args: Any, limit_s: float = UNREACHABLE_S, pause_s: float = PAUSE_S) -> Any:
    """The answer of an actor, asked again while Ray cannot reach it: its host comes back, or Ray starts the actor elsewhere.

    Ray's own retries of a call are over within seconds.

    Args:
        method: of the actor's handle; called with `args`.

    Raises:
        ActorUnavailableError: still, after `limit_s`.
        RayActorError: the actor is dead for good.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return ray.get(method.remote(*args))
        except ActorUnavailableError:
            if time.monotonic() + pause_s > deadline:
                raise
            time.sleep(pause_s)


class Gate:
    """Lets many calls into an engine at a time, or one alone; who wants to be alone is not overtaken."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.inside, self.want_alone = 0, 0

    @contextmanager
    def together(self) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.want_alone == 0)
            self.inside += 1
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self.changed:
            self.want_alone += 1
            self.changed.wait_for(lambda: self.inside == 0)
            self.inside += 1
        try:
            yield
        finally:
            with self.changed:
                self.want_alone -= 1
            self._leave()

    def _leave(self) -> None:
        with self.changed:
            self.inside -= 1
            self.changed.notify_all()


class EngineActor:
    """An engine of either kind, with what the pool needs to find its processes again."""

    def __init__(self, settings: EngineSettings, policy: PolicyRef, companion: ActorHandle) -> None:
        self.companion, self.gate = companion, Gate()
        # Ray starts an actor again whose process died; one that raises here stays dead.
        me = ray.get_runtime_context().get_actor_id()
        died = outlast(companion.loads, me)
        if died > START_RETRIES:
            raise StageError(f"its process died {died} times while it loaded (memory is the usual reason)")
        self.engine = start_engine(settings, policy)
        outlast(companion.loaded, me)

    def generate(self, requests: Sequence[Request], sampling: Mapping[str, Any]) -> list[list[Sample]]:
        with self.gate.together():
            return self.engine.generate(requests, sampling)

    def generate_alone(self, requests: Sequence[Request], sampling: Mapping[str, Any], token: str) -> list[list[Sample]]:
        """Sample with nothing else in the engine; the companion knows from when on a crash is this call's own."""
        with self.gate.alone():
            outlast(self.companion.begins, token)
            return self.engine.generate(requests, sampling)

    def load(self) -> int:
        return self.engine.load()

    @ray.method(max_task_retries=START_RETRIES)
    def processes(self) -> Family:
        """Waits while the actor starts again."""
        return family()


def start_engine(settings: EngineSettings, policy: PolicyRef) -> Any:
    """Load the policy into an engine of the kind that the settings name.

    Raises:
        StageError: it does not load; the message is one line, which `load_failure` finds again in Ray's.
    """
    if settings.kind == "vllm":
        from dpo_ray.engines.vllm import VllmEngine as Kind
    else:
        from dpo_ray.engines.hf import HfEngine as Kind
    try:
        return Kind(settings, policy)
    except Exception as error:  # what the engine's libraries raise is of any kind
        text = " ".join(str(error).split())
        raise StageError(f"{type(error).__name__}: {text[:MAX_CAUSE_CHARS]}") from error


def load_failure(error: RayActorError) -> str | None:
    """Why an engine did not load, from the traceback that Ray hands over as text; None if that is not why it is dead."""
    return str(raised_last(str(error))) if "creation task" in str(error) else None


class Companion:
    """A process beside the engines: applies the chat template, and knows what an engine was doing when it died.

    Rendering in a thread of the engine's process slows the engine's steps down, by Python's lock; in the short-lived tasks
    around the engines, loading the libraries costs seconds of CPU a process.
    """

    def __init__(self, policy: PolicyRef) -> None:
        self.policy = policy
        self.began: set[str] = set()
        self.crashes: set[str] = set()
        self.loading: dict[str, int] = {}
        self.starts: Counter[str] = Counter()

    @ray.method(max_task_retries=START_RETRIES)
    def render(self, rows: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any], max_tokens: int) -> list[Rendered]:
        return render(self.policy, rows, template_kwargs, max_tokens)

    @ray.method(max_task_retries=START_RETRIES)
    def loads(self, engine: str) -> int:
        """The engine loads its policy from now on; how often it has died since it did so with success."""
        self.loading[engine] = self.loading.get(engine, -1) + 1
        self.starts[engine] += 1
        return self.loading[engine]

    @ray.method(max_task_retries=START_RETRIES)
    def loaded(self, engine: str) -> None:
        self.loading.pop(engine, None)

    @ray.method(max_task_retries=START_RETRIES)
    def begins(self, token: str) -> None:
        """The call `token` runs from now on, with nothing else in its engine."""
        self.began.add(token)

    @ray.method(max_task_retries=START_RETRIES)
    def crashed(self, token: str) -> tuple[bool, int]:
        """Whether the call that failed had begun, and how many calls have crashed an engine by now."""
        self.crashes |= {token} & self.began
        return token in self.began, len(self.crashes)

    def restarts(self) -> int:
        """How often engines have started again."""
        return self.starts.total() - len(self.starts)

    @ray.method(max_task_retries=START_RETRIES)
    def processes(self) -> Family:
        return family()


def family() -> Family:
    """This node's id, and pid and start time of this process and its children."""
    me = psutil.Process()
    return ray.get_runtime_context().get_node_id(), [(p.pid, p.create_time()) for p in [me, *me.children(recursive=True)]]
