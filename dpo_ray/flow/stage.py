"""A stage of the plan: an inert description that the runner compares, skips or runs. Making one runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from dpo_ray.flow.artifact import Artifact, FileRecord


@dataclass(frozen=True)
class Needs:
    """What a stage holds on the cluster while it runs: at least `count` bundles, each on one node."""

    count: int = 0
    cpus: float = 0.0
    gpus: float = 0.0
    what: str = ""
    """What one bundle is, for messages: `engine`, `train worker`."""
    beside: float = 0.0
    """CPUs of the Ray Data tasks that must find room beside the bundles, on any node; without it they would wait for ever."""
    node_labels: Mapping[str, str] = field(default_factory=dict)
    """What the nodes of the bundles must have, as Ray's label_selector."""

    def __str__(self) -> str:
        if not self.count:
            return "-"
        gpus = f" + {self.gpus:g} GPU" if self.gpus else ""
        labels = f" on {labels_text(self.node_labels)}" if self.node_labels else ""
        return f"{self.count} {self.what} x {self.cpus:g} CPU{gpus}{labels}"


def labels_text(labels: Mapping[str, str]) -> str:
    """Labels as people read them: `pool=train, market=!spot`."""
    return ", ".join(f"{key}={value}" for key, value in labels.items())


class Engine(Protocol):
    """A running pool of engines that several stages may share."""

    def close(self) -> None:
        """Stop it, and return only when its processes are gone."""
        ...

    def restarts(self) -> int:
        """How often engines of it have died and started again."""
        ...


@dataclass(frozen=True)
class EngineSpec:
    """How to start an engine; stages with an equal `key` can share one."""

    key: str
    start: Callable[[Mapping[str, Artifact]], Engine]
    """Called with the inputs of the stage that needs it first."""


class Progress(Protocol):
    """Where a stage says how far it is."""

    def begin(self, step: str) -> None:
        """A step of the stage begins; rates and time left count from here."""
        ...

    def update(self, done: int, total: int, counters: Mapping[str, float]) -> None:
        """Rows done, rows in all, and counters such as tokens; the first call says what was already done before."""
        ...

    def waits(self, text: str) -> None:
        """Say what the stage waits for."""
        ...


@dataclass(frozen=True)
class StageContext:
    """What the runner hands to a stage."""

    directory: str
    """Where the stage writes; the runner commits it."""
    fingerprint: str
    inputs: Mapping[str, Artifact]
    engine: Any
    release_engine: Callable[[], None]
    """Close the engine before the stage ends, when what follows inside it needs its place."""
    progress: Progress


@dataclass(frozen=True)
class StageOutput:
    """What a stage hands back to be committed."""

    files: list[FileRecord]
    rows_in: int
    rows_out: int
    dropped: Mapping[str, int]
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One box of the flow in one round."""

    name: str
    round: int | None
    """None for what all rounds share."""
    version: int
    """Raised when the same config and inputs would give another result."""
    config: Mapping[str, Any]
    """What decides the result, as plain JSON values; no resources, no paths of the run."""
    inputs: Mapping[str, str]
    """Role -> key of the stage whose output is read."""
    run: Callable[[StageContext], StageOutput]
    external: Callable[[], Mapping[str, str]] = dict
    """Content hashes of what the config names outside the run: source files, local models, hub commits."""
    needs: Needs = Needs()
    check: Callable[[Artifact], object] = id
    """Called with the committed stage, run or skipped; raises when what it holds is not enough for the plan."""
    engine: EngineSpec | None = None
    resources: Mapping[str, Any] = field(default_factory=dict)
    """Recorded in the manifest, in no fingerprint."""

    @property
    def key(self) -> str:
        return self.name if self.round is None else f"round_{self.round:02d}/{self.name}"
